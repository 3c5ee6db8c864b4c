"""The run page: a server that shows runs from their directories alone, and the report that is one file."""
