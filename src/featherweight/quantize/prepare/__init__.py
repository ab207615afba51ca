"""What evens ranges before anything is rounded."""
