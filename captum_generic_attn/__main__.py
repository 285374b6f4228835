"""`python -m captum_generic_attn`, the same as the command `captum-generic-attn`."""

from captum_generic_attn.cli import main

if __name__ == "__main__":
    main()
