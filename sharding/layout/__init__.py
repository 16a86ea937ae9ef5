"""Layouts that programs run in: meshes, rule tables, torus layouts, and the moves between them."""
