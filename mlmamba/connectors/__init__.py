"""The connectors' classes, by family. Their names in configs and recipes are in mlmamba/connector.py."""
