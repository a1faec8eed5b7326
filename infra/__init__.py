"""What the project runs on: settings, the local stack, and the engines that place node agents."""
