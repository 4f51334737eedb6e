"""Ray Data pipelines: sources -> records -> tokens -> packed Arrow shards. Imports mlmamba, never workflows."""
