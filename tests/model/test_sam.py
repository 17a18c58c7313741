"""Our SAM against the `segment-anything` package: the same weights give the same numbers."""

import pytest
import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling import PromptEncoder as PackagePromptEncoder
from segment_anything.modeling import Sam as PackageSam
from segment_anything.modeling.image_encoder import ImageEncoderViT

from model.sam import SAM_CONFIGS, Sam, SamConfig, build_sam, sam_config

SMALL = dict(image_size=96, patch_size=8, embed_dim=32, depth=3, num_heads=2, prompt_embed_dim=32)
SMALL |= dict(decoder_heads=4, decoder_mlp_dim=48, iou_head_hidden_dim=24)


def package_sam(config: SamConfig) -> PackageSam:
    encoder = ImageEncoderViT(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        out_chans=config.prompt_embed_dim,
        norm_layer=lambda n: torch.nn.LayerNorm(n, eps=1e-6),
        use_rel_pos=True,
        window_size=config.window_size,
        global_attn_indexes=config.global_attn_indexes,
    )
    grid = (config.grid_size, config.grid_size)
    prompt = PackagePromptEncoder(
        config.prompt_embed_dim, grid, (config.image_size,) * 2, config.mask_in_chans
    )
    two_way = TwoWayTransformer(2, config.prompt_embed_dim, config.decoder_heads, config.decoder_mlp_dim)
    decoder = MaskDecoder(
        transformer_dim=config.prompt_embed_dim,
        transformer=two_way,
        iou_head_hidden_dim=config.iou_head_hidden_dim,
    )
    return PackageSam(encoder, prompt, decoder)


def pair(window_size: int = 5) -> tuple[Sam, PackageSam]:
    torch.manual_seed(0)
    config = SamConfig(**SMALL, window_size=window_size, global_attn_indexes=(1,))
    ours, theirs = Sam(config), package_sam(config)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("window_size", [0, 4, 5])
def test_image_encoder_equals_the_package(window_size: int) -> None:
    ours, theirs = pair(window_size)
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(ours.encode(x), theirs.image_encoder(x), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.encode(x, max_batch=1), ours.encode(x), atol=1e-5, rtol=1e-5)


def test_encoder_gradients_equal_the_package() -> None:
    ours, theirs = pair()
    x = torch.randn(1, 3, 96, 96)
    weight = torch.randn(1, 32, 12, 12)
    for model in (ours, theirs):
        (model.image_encoder(x) * weight).sum().backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.image_encoder.named_parameters():
        expected = theirs_by_name[f"image_encoder.{name}"].grad
        torch.testing.assert_close(parameter.grad, expected, atol=2e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", ["points", "boxes", "masks", "points+boxes+masks"])
def test_prompts_of_several_images_equal_one_by_one(kind: str, multimask: bool) -> None:
    ours, theirs = pair()
    embeddings = torch.randn(2, 32, 12, 12)
    index = torch.tensor([0, 1, 1])
    points = (torch.rand(3, 2, 2) * 96, torch.tensor([[1, 0], [1, 1], [0, 1]])) if "points" in kind else None
    boxes = torch.rand(3, 4) * 96 if "boxes" in kind else None
    masks = torch.randn(3, 1, 48, 48) if "masks" in kind else None
    logits, iou = ours(
        image_embeddings=embeddings,
        image_index=index,
        points=points,
        boxes=boxes,
        masks=masks,
        multimask_output=multimask,
    )
    assert logits.shape == (3, 3 if multimask else 1, 48, 48)
    for i, image in enumerate(index.tolist()):
        one = slice(i, i + 1)
        sparse, dense = theirs.prompt_encoder(
            points=points and (points[0][one], points[1][one]),
            boxes=None if boxes is None else boxes[one],
            masks=None if masks is None else masks[one],
        )
        expected, expected_iou = theirs.mask_decoder(
            image_embeddings=embeddings[image : image + 1],
            image_pe=theirs.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        torch.testing.assert_close(logits[one], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(iou[one], expected_iou, atol=1e-4, rtol=1e-4)


def test_box_as_labelled_points_equals_box() -> None:
    ours, _ = pair()
    boxes = torch.rand(2, 4) * 96
    labels = torch.tensor([[2, 3]]).expand(2, 2)
    as_points = ours.prompt_encoder.sparse(boxes.view(2, 2, 2), labels)
    torch.testing.assert_close(as_points, ours.prompt_encoder(None, boxes, None)[0])


def test_postprocess_equals_the_package() -> None:
    ours, theirs = pair()
    low_res = torch.randn(2, 1, 48, 48)
    out = ours.postprocess(low_res, (96, 61), (201, 128))
    torch.testing.assert_close(out, theirs.postprocess_masks(low_res, (96, 61), (201, 128)))
    assert out.dtype == torch.float32
    assert ours.postprocess(low_res[:0], (96, 61), (7, 5)).shape == (0, 1, 7, 5)


def test_no_prompt_at_all_gives_an_empty_batch() -> None:
    ours, _ = pair()
    logits, iou = ours.decode(
        torch.randn(1, 32, 12, 12), torch.zeros(0, 1, 32), image_index=torch.zeros(0).long()
    )
    assert logits.shape == (0, 1, 48, 48) and iou.shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_positions_in_fp32(dtype: torch.dtype) -> None:
    ours, _ = pair()
    expected = ours.prompt_encoder.get_dense_pe()
    matrix = ours.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.clone()
    x = torch.randn(1, 3, 96, 96)
    reference = ours(x, points=(torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1)))[0]
    ours.to(dtype)
    assert torch.equal(ours.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix, matrix)
    assert torch.equal(ours.prompt_encoder.get_dense_pe(), expected)
    logits = ours(x, points=(torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1)))[0]
    assert logits.dtype == dtype and ours.encode(x).dtype == dtype
    assert (logits.float() - reference).abs().max() < 0.1 * reference.abs().max()


def test_low_precision_positions_on_request() -> None:
    sam = build_sam("sam_tiny", low_precision_pe=True).to(torch.bfloat16)
    assert sam.prompt_encoder.get_dense_pe().dtype == torch.bfloat16


def test_named_variants_have_the_packages_parameters() -> None:
    counts = {"sam_vit_h": 594, "sam_vit_l": 482, "sam_vit_b": 314}
    for name, expected in counts.items():
        with torch.device("meta"):
            assert len(build_sam(name).state_dict()) == expected
    assert sum(p.numel() for p in build_sam("sam_tiny").parameters()) < 1_000_000
    assert SamConfig.from_dict(SAM_CONFIGS["sam_tiny"].to_dict()) == SAM_CONFIGS["sam_tiny"]


def test_faults_are_named() -> None:
    with pytest.raises(ValueError, match="sam_vit_h"):
        sam_config("sam_vit_x")
    with pytest.raises(ValueError, match="colour"):
        SamConfig.from_dict({"colour": 1})
    with pytest.raises(ValueError, match="128"):
        build_sam("sam_tiny").encode(torch.zeros(1, 3, 64, 64))
