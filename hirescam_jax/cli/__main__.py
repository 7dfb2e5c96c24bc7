"""`python -m hirescam_jax.cli`: the `hirescam` command."""

from hirescam_jax.cli.main import main

if __name__ == "__main__":
    main()
