"""How a run lives on machines: assembled, compiled, trained in a loop, stopped, resumed and guarded."""
