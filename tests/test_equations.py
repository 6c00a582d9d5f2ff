"""The paper, equation by equation, each written out naively here and compared in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import make_model, random_images

import kernels
import lctr
from kernels import reference

SIZE = dict(img_size=(12, 20), patch_size=4, embed_dim=12, depth=3, num_heads=2)
B, S, N, D, h, w, C, G = 2, 2, 15, 12, 3, 5, 7, 4  # of the models below; the grid is 3 x 5


def make(**changes):
    return make_model(C, **SIZE | changes)


def images(batch=B):
    return random_images(batch, SIZE["img_size"])


def equal(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def attention_of(model, x):
    """Each block's A_l (B, S, N+1, N+1), L of them."""
    return [block.full for block in model.forward_features(x, "full")[1]]


def features_of(model, x):
    """X_L (B, D, h, w)."""
    tokens, _ = model.forward_features(x)
    return tokens[:, 1:].transpose(1, 2).reshape(len(x), D, h, w)


def test_eq1_tokens_are_the_class_token_and_projected_patches_plus_positions():
    model, x = make(), images()
    projection = model.patch_embed.proj.weight.flatten(1).T  # (3*P*P, D)
    patches = F.unfold(x, 4, stride=4).mT @ projection + model.patch_embed.proj.bias  # (B, N, D)
    cls_token = model.cls_token.expand(B, 1, D)
    equal(model.embed(x), torch.cat([cls_token, patches], 1) + model.pos_embed)


@pytest.mark.parametrize("head", ["cdm", "conv"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_eq2_logits_are_the_global_average_of_the_class_maps(head, kernel_size):
    model, x = make(head=head, kernel_size=kernel_size), images()
    class_maps = model.localize(x, "all").class_maps  # (B, C, h, w)
    equal(model(x), class_maps.sum((2, 3)) / (h * w))


def test_eq2_padded_pool_averages_3_by_3_positions_first_as_the_authors_code_does():
    model, x = make(pool="padded"), images()
    class_maps = model.localize(x, "all").class_maps
    equal(model(x), F.avg_pool2d(class_maps, 3, stride=1, padding=1).mean((2, 3)))


@pytest.mark.parametrize("head", ["cdm", "conv"])
def test_eq2_gradient_of_the_loss_reaches_every_parameter(head):
    """Also through the attention maps, which are not detached. The naive model is `trace`'s."""
    model, x, labels = make(head=head), images(), torch.tensor([3, 5])
    tokens, maps = model.forward_features(x, "full")
    features = tokens[:, 1:].mT.reshape(B, D, h, w)
    cls_map = torch.stack([block.full.mean(1)[:, 0, 1:] for block in maps]).mean(0)
    scores = model.conv_head.scores(features, cls_map.reshape(B, h, w))
    weight, bias = model.conv_head.conv_kernels(), model.conv_head.bias
    naive_logits = lctr.dynamic_conv2d(features, scores, weight, bias).mean((2, 3))
    naive_loss = -naive_logits.softmax(1)[range(B), labels].log().mean()  # Eq. 2
    loss = F.cross_entropy(model(x), labels)
    equal(loss, naive_loss)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(naive_loss, parameters)
    for gradient, naive_gradient in zip(torch.autograd.grad(loss, parameters), expected):
        assert naive_gradient.abs().max() > 0
        equal(gradient, naive_gradient, 1e-10)


def test_eq3_localisation_map_is_the_predicted_classs_map_times_the_relation_map():
    model, x = make(), images()
    every = model.localize(x, "all")
    predicted = every.logits.argmax(1)
    expected = every.class_maps[range(B), predicted].clamp(min=0) * every.relation_map
    fused = lctr.fuse(model.localize(x))  # (B, 1, h, w)
    equal(fused[:, 0], expected)
    assert (fused > 0).any()


def test_fuse_multiplies_the_maps_that_a_coupling_names():
    localization = make().localize(images(), torch.tensor([[1, 4, 4], [0, 2, 6]]))
    class_maps = localization.class_maps
    cls_map = localization.cls_map[:, None]
    relation_map = localization.relation_map[:, None]
    assert class_maps.min() < 0 < class_maps.max()
    expected = {
        "relation": class_maps.clamp(min=0) * relation_map,
        "cls": class_maps.clamp(min=0) * cls_map,
        "none": class_maps.clamp(min=0),
        "relation-only": relation_map.expand(B, 3, h, w),
        "cls-only": cls_map.expand(B, 3, h, w),
    }
    assert set(expected) == set(lctr.COUPLINGS)
    for coupling, maps in expected.items():
        assert torch.equal(lctr.fuse(localization, coupling), maps)
    assert torch.equal(lctr.fuse(localization, "cls", relu=False), class_maps * cls_map)


def test_eq4_attention_is_the_softmax_of_scaled_products():
    model, x = make(), images()
    block = model.blocks[0]
    qkv = block.attn.qkv(block.norm1(model.embed(x)))  # (B, N+1, 3*D)
    q, k, _ = (part.reshape(B, N + 1, S, D // S) for part in qkv.split(D, 2))
    attn = attention_of(model, x)[0]
    for b, s, i in itertools.product(range(B), range(S), (0, 1, N)):
        products = torch.stack([q[b, i, s] @ k[b, j, s] for j in range(N + 1)])
        powers = (products / (D / S) ** 0.5).exp()
        equal(attn[b, s, i], powers / powers.sum())


def test_eq4_tokens_equal_those_of_torchs_own_encoder():
    model, x = make(), images()
    tokens = model.embed(x)
    for block in model.blocks:
        layer = torch.nn.TransformerEncoderLayer(
            D, S, 4 * D, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
        layer.load_state_dict({
            "self_attn.in_proj_weight": block.attn.qkv.weight,
            "self_attn.in_proj_bias": block.attn.qkv.bias,
            "self_attn.out_proj.weight": block.attn.proj.weight,
            "self_attn.out_proj.bias": block.attn.proj.bias,
            "linear1.weight": block.mlp.fc1.weight,
            "linear1.bias": block.mlp.fc1.bias,
            "linear2.weight": block.mlp.fc2.weight,
            "linear2.bias": block.mlp.fc2.bias,
            "norm1.weight": block.norm1.weight,
            "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight,
            "norm2.bias": block.norm2.bias,
        }, assign=True)
        with torch.no_grad():
            tokens = layer.eval()(tokens)
    for attention in ("cls", "full"):
        equal(model.forward_features(x, attention)[0], model.norm(tokens))
    with torch.no_grad():
        equal(model.forward_features(x, "relation")[0], model.norm(tokens))


def test_rpam_weights_each_row_of_attention_by_the_class_tokens_attention():
    attn = attention_of(make(), images())[0]
    mean = attn.sum(1) / S  # A'_l
    expected = torch.zeros(B, N, dtype=attn.dtype)
    for b, j, i in itertools.product(range(B), range(N), range(N + 1)):
        expected[b, j] += mean[b, 0, i] * mean[b, i, 1 + j] / (N + 1)
    cls_attn, relation = lctr.rpam(attn)
    equal(cls_attn, mean[:, 0])
    equal(relation, expected)


def test_rpam_of_the_model_its_kernels_and_the_reference_are_one():
    model, x = make(), images()
    full = model.forward_features(x, "full")[1]
    with torch.no_grad():
        fused = model.forward_features(x, "relation")[1]
    cls_only = model.forward_features(x, "cls")[1]
    for block in range(SIZE["depth"]):
        cls_attn, relation = lctr.rpam(full[block].full)
        equal(full[block].cls, cls_attn)
        equal(full[block].relation, relation)
        equal(fused[block].cls, cls_attn)
        equal(fused[block].relation, relation)
        equal(cls_only[block].cls, cls_attn)
        assert cls_only[block].relation is None and fused[block].full is None
        for operators in (kernels, reference):
            maps = operators.aggregate_attention(full[block].full)
            equal(maps[0], cls_attn)
            equal(maps[1], relation)


def test_eq5_maps_are_means_over_the_blocks_laid_on_the_grid():
    model, x = make(), images()
    localization = model.localize(x)
    maps = [lctr.rpam(attn) for attn in attention_of(model, x)]
    relation = sum(relation for _, relation in maps) / SIZE["depth"]
    cls_attn = sum(cls_attn for cls_attn, _ in maps)[:, 1:] / SIZE["depth"]
    for row, column in itertools.product(range(h), range(w)):
        equal(localization.relation_map[:, row, column], relation[:, row * w + column])
        equal(localization.cls_map[:, row, column], cls_attn[:, row * w + column])


def test_cues_are_a_convolution_of_what_reversal_leaves():
    model, x = make(), images()
    features, cls_map = features_of(model, x), model.localize(x).cls_map
    erased = features * (1 - cls_map)[:, None]
    conv = model.cdm.conv
    equal(model.cdm.cues(features, cls_map), F.conv2d(erased, conv.weight, conv.bias, padding=1))


def test_erase_minmax_normalises_each_image_before_it_is_reversed():
    ranges = torch.tensor([0.1, 1.0], dtype=torch.float64)[:, None, None]
    cls_map = torch.rand(B, h, w, dtype=torch.float64) * ranges
    reverse = make(erase="minmax").cdm.reverse
    for before, after in zip(cls_map, reverse(cls_map)):
        equal(after, 1 - (before - before.min()) / (before.max() - before.min()))
    constant = torch.full_like(cls_map, 0.2)
    equal(reverse(constant), torch.ones_like(constant))


@pytest.mark.parametrize("scorer", ["separate", "shared", "gap", "gmp"])
def test_scores_are_table_5s_sigmoid_of_pooled_cues(scorer):
    model, x = make(scorer=scorer), images()
    features, cls_map = features_of(model, x), model.localize(x).cls_map
    cdm = model.cdm
    cues = cdm.cues(features, cls_map).flatten(2)  # (B, D, N)
    average, maximum = cues.sum(2) / N, cues.max(2).values
    logits = {
        "separate": lambda: cdm.score_avg(average) + cdm.score_max(maximum),
        "shared": lambda: cdm.score_avg(average + maximum),
        "gap": lambda: cdm.score_avg(average),
        "gmp": lambda: cdm.score_max(maximum),
    }[scorer]()
    equal(cdm.scores(features, cls_map), 1 / (1 + (-logits).exp()))


@pytest.mark.parametrize("num_kernels, kernel_size", [(4, 3), (1, 3), (4, 1)])
def test_eq6_convolves_each_image_with_its_own_mixture_of_kernels(num_kernels, kernel_size):
    model, x = make(num_kernels=num_kernels, kernel_size=kernel_size), images()
    features, cls_map = features_of(model, x), model.localize(x).cls_map
    scores = model.cdm.scores(features, cls_map)
    expected = []
    for image in range(B):
        mixed = sum(scores[image, g] * model.cdm.weight[g] for g in range(num_kernels))
        expected.append(F.conv2d(features[image], mixed, model.cdm.bias, padding=kernel_size // 2))
    expected = torch.stack(expected)
    operands = features, scores, model.cdm.weight, model.cdm.bias
    for operators in (lctr, reference, kernels):
        equal(operators.dynamic_conv2d(*operands), expected)
    equal(model.localize(x, "all").class_maps, expected)


def test_eq6_static_head_is_the_same_with_one_kernel_and_a_score_of_one():
    model, x = make(head="conv"), images()
    features = features_of(model, x)
    maps = F.conv2d(features, model.head.weight, model.head.bias, padding=1)
    equal(model.localize(x, "all").class_maps, maps)
    score = torch.ones(B, 1, dtype=x.dtype)
    equal(lctr.dynamic_conv2d(features, score, model.head.weight[None], model.head.bias), maps)


@pytest.mark.parametrize("head", ["cdm", "conv", "token"])
def test_trace_yields_what_localize_computes(head):
    model, x = make(head=head), images()
    localization = model.localize(x)
    steps = {name.split(":")[0]: value for _, name, _, value in lctr.trace(model, x)}
    equal(steps["logits"], localization.logits)
    equal(steps["M_*^r"], localization.relation_map)
    equal(steps["M~_*^c"], localization.cls_map)
    if head != "token":
        equal(steps["X_CDM (X_SGR)"], model.localize(x, "all").class_maps)
        equal(steps["M^fuse"], lctr.fuse(localization))
