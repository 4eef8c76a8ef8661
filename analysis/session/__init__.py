"""From the options of a command to an open run: model on its device, images, one process or several."""
