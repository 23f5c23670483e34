"""``python -m axolotl_dpo_ext X``: the same commands as ``axolotl dpo-X``, also without Axolotl."""

from axolotl_dpo_ext.cli import main

if __name__ == "__main__":
    main()
