"""`python -m eigenpeft`, which is also what `accelerate launch -m eigenpeft` starts."""

from eigenpeft.cli import main

if __name__ == "__main__":
    main()
