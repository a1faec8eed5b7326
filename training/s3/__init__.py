"""The object store, the only module here that speaks S3, and what it is made of."""
