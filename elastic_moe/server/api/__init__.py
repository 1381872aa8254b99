"""The endpoints, each in the file that its path names."""
