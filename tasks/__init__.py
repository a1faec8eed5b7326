"""One stage per file: typed config in, typed result out. A stage uses no Prefect context, so `.fn` always works."""
