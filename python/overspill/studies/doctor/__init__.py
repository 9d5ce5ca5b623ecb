"""What slows decoding down on a machine."""
