"""Where a registered model came from: told (`why`), proven (`verify`), and done again (`replay`)."""
