"""What layouts of a model over ranks take, measured."""
