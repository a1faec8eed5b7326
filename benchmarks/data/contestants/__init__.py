"""One file per contestant. Each runs in an environment of its own, so it imports only its library and `protocol`."""
