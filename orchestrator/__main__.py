"""``python -m orchestrator`` is the ``fedlora`` command, for job submission."""

from orchestrator.cli import main

if __name__ == "__main__":
    main()
