"""`--dry-run`: what a workflow will take, worked out without Ray, downloads or weights."""
