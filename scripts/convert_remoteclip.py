"""Turn an OpenCLIP file (`RemoteCLIP-ViT-L-14.pt`) into a tower folder that LISAT and transformers read.

    python scripts/convert_remoteclip.py RemoteCLIP-ViT-L-14.pt remote_clip_vit_l_14 --activation gelu

The activation cannot be seen in the weights. RemoteCLIP is used with the plain OpenCLIP name ViT-L-14: gelu.
OpenAI's own weights and OpenCLIP's `-quickgelu` variants: quick_gelu.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(argv: list[str] | None = None) -> None:
    """Parse, convert, print the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="OpenCLIP weight file (.pt, .bin, .safetensors)")
    parser.add_argument("folder", help="tower folder to write")
    parser.add_argument("--activation", required=True, choices=("gelu", "quick_gelu"))
    parser.add_argument("--heads", type=int, help="attention heads; default: width / 64")
    args = parser.parse_args(argv)
    from model.tower_files import convert_remote_clip

    try:
        print(convert_remote_clip(args.source, args.folder, args.activation, args.heads))
    except ValueError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
