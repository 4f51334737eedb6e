"""Where a workflow's files are: folders on a disk or in an object store, their names, and who may write them."""
