"""What is stored on which device."""
