"""`python -m distil_jax VERB ...` is `distil-jax VERB ...`."""

from distil_jax.cli import program

if __name__ == "__main__":
    program()
