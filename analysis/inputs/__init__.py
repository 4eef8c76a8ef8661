"""What comes from outside: images that a data string names, crops and augmented ones; files of weights; factories."""
