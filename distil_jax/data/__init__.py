"""Data pipelines: text -> tokens -> packed rows on disk -> batches, and labelled examples -> tables -> batches."""
