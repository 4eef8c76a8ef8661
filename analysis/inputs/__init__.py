"""What comes from outside: the images that a data string names, and the form of a user's model."""
