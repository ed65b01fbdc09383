"""What is done to weights before they are rounded, one a file. The function of the model stays as it is."""
