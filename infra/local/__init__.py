"""The local stack: every service, and the local engine, under one process supervisor."""
