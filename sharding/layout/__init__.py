"""What runs: meshes, rule tables, layouts, and the moves between them."""
