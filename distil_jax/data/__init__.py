"""Where rows come from: text -> tokens -> packed rows on disk -> batches."""
