"""What the library is measured against: a program written by hand, and a model's reference implementation."""
