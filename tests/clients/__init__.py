"""The server as others see it that speak to it: ``pip install --group clients && pytest tests/clients -m clients``."""
