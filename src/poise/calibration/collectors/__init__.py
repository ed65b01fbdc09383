"""Statistics of activations, one a file; files with a leading underscore are what they share."""
