"""The video transformers: sizes, patches, rotary tables, modulation by hand, padding, and the attention hook."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.models import video_dit, video_parts
from jaxrepro.models.hunyuan_video import HunyuanVideoConfig
from jaxrepro.models.video_dit import Aux, Condition
from jaxrepro.models.wan import WanConfig
from jaxrepro.ops import routed
from jaxrepro.ops.video_grid import VideoGrid

# one block of a kind, or so many that they are a loop, since each is compiled; ffn = d for blocks by hand
HUNYUAN = replace(video_dit.PRESETS["hunyuan_tiny"], double=1, single=1, ffn=32)
WAN = replace(video_dit.PRESETS["wan_tiny"], layers=5, ffn=32)
KINDS = {"hunyuan": HUNYUAN, "wan": WAN}
SHAPE, SLOTS = (2, 4, 2, 4, 6), 5  # latents; text
TOKENS = 2 * 2 * 3


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """Config, parameters with biases and norms that show, latents, times, condition."""
    cfg = KINDS[request.param]
    return cfg, drawn(cfg), *inputs(cfg)


def drawn(cfg):
    rng = np.random.default_rng(0)

    def draw(p):
        x, more = (rng.normal(size=p.shape) for _ in range(2))
        x = {"zeros": 0, "ones": 1}[p.std] if isinstance(p.std, str) else p.std * x
        return jnp.asarray(x + 0.1 * more, jnp.float32)

    return jax.tree.map(draw, video_dit.declare(cfg))


def inputs(cfg):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    c = Condition(draw(2, SLOTS, 12))
    if isinstance(cfg, HunyuanVideoConfig):
        c = c._replace(
            length=jnp.array([3, 5]), pooled=draw(2, 8), guidance=jnp.array([6000.0, 1000.0])
        )
    return draw(*SHAPE), jnp.array([900.0, 42.0]), c


@partial(jax.jit, static_argnums=0)
def plain(cfg, params, x, t, c):
    """Velocity, and the streams behind each block. Most tests share its programs, since compiling is what they cost."""
    return video_dit.apply(params, cfg, x, t, c, collect=lambda x, y, layer: (x, y))


def velocity(*arguments):
    return plain(*arguments)[0]


LAYOUT = VideoGrid((2, 2, 3), tile=(1, 2, 2), window=(1, 1, 1), bucket=(1, 2, 1))
TRACED = []  # what attention was given, once a trace


@partial(jax.jit, static_argnums=0)
def hooked(cfg, share, route, params, x, t, c):
    """Attention by a route, times a share, both by layer; tokens in the order of LAYOUT."""

    def attend(q, k, v, layer, aux):
        TRACED.append((cfg, q.shape, aux.grid, aux.text))
        o = routed.routed(q, k, v, route[layer], LAYOUT, text=aux.length, chunk=1)
        return share[layer] * o

    keep = lambda x, y, layer: layer
    around = lambda module, layer, state: (module(), 10 * state + layer)
    state = jnp.array(1)
    return video_dit.apply(
        params, cfg, x, t, c, attend=attend, layout=LAYOUT, collect=keep, around=around, state=state
    )


def by_default(cfg):
    """A share and a route that change nothing."""
    return jnp.ones(cfg.layers), jnp.zeros((cfg.layers, cfg.heads), int)


# Published sizes.
@pytest.mark.parametrize(
    "name, n",
    [("hunyuan", 12_821_012_544), ("wan_14b", 14_288_491_584), ("wan_1_3b", 1_418_996_800)],
)
def test_presets_have_the_published_number_of_parameters(name, n):
    cfg = video_dit.PRESETS[name]
    tree = jax.eval_shape(lambda key: video_dit.init(key, cfg), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(tree)) == n == video_dit.count(cfg)


sides = st.integers(1, 3)


@settings(max_examples=10, deadline=None)
@given(
    st.tuples(sides, sides, sides),
    st.tuples(sides, sides, sides),
    st.sampled_from(["first", "last"]),
)
def test_unpatchify_undoes_patchify(grid, patch, channels):
    shape = (2, 3, *(n * p for n, p in zip(grid, patch)))
    x = jnp.asarray(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))

    def there_and_back(x):
        tokens = video_parts.patchify(x, patch, channels=channels)
        return video_parts.unpatchify(tokens, grid, patch, channels=channels)

    np.testing.assert_array_equal(jax.jit(there_and_back)(x), x)


def test_tokens_are_in_raster_order_and_channels_where_they_belong():
    f, h, w = np.meshgrid(np.arange(2), np.arange(4), np.arange(6), indexing="ij")
    x = jnp.asarray(np.stack([100 * f + 10 * h + w, -(100 * f + 10 * h + w)])[None], jnp.float32)
    first = video_parts.patchify(x, (1, 2, 2))
    assert first[0, :3, 0].tolist() == [0, 2, 4] and first[0, 6, 0] == 100
    assert first[0, 1].tolist() == [2, 3, 12, 13, -2, -3, -12, -13]
    last = video_parts.patchify(x, (1, 2, 2), channels="last")
    assert last[0, 1].tolist() == [2, -2, 3, -3, 12, -12, 13, -13]


@pytest.mark.parametrize("dims, theta", [((16, 56, 56), 256.0), ((44, 42, 42), 1e4)])
def test_rotary_tables_turn_pairs_by_place_and_frequency(dims, theta):
    grid = (2, 3, 4)
    cos, sin = video_parts.rope_tables(grid, dims, theta)
    token = (1 * 3 + 2) * 4 + 3  # frame 1, row 2, column 3
    angle = [
        n * theta ** (-2 * j / dim) for n, dim in zip((1, 2, 3), dims) for j in range(dim // 2)
    ]
    np.testing.assert_allclose(cos[token], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[token], np.sin(angle), atol=1e-6)
    assert cos.shape == (24, 64)


def test_the_released_models_turn_the_published_channels():
    assert video_dit.PRESETS["wan_14b"].rope == (44, 42, 42)
    assert video_dit.PRESETS["hunyuan"].rope == (16, 56, 56)


def test_rotation_is_of_neighbouring_channels():
    x = jnp.array([[[[1.0, 2.0, 3.0, 4.0]]]])
    turned = video_parts.rotate(x, jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]]))
    assert turned[0, 0, 0].tolist() == [-2, 1, 3, 4]


def test_the_time_embedding_starts_with_cosines():
    x = video_parts.sinusoid(jnp.array([10.0]), 4)[0, 0]
    np.testing.assert_allclose(x, [np.cos(10), np.cos(0.1), np.sin(10), np.sin(0.1)], atol=1e-6)


# Modulation by hand: queries and keys are 0, so that attention is a mean; projections are the identity.


def ln(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def stripped(cfg):
    """All parameters 0: blocks pass on what they get."""
    return jax.tree.map(lambda p: np.zeros(p.shape, np.float32), video_dit.abstract(cfg))


def straight(cfg, w, v):
    """Values, output and feed-forward layer of stacked weights w that pass on what they get."""
    one = np.eye(cfg.d, dtype=np.float32)
    w["v"]["kernel"][0] = one.reshape(cfg.d, cfg.heads, -1)
    w["o"]["kernel"][0] = one.reshape(cfg.heads, -1, cfg.d)
    v["fc1"]["kernel"][0] = v["fc2"]["kernel"][0] = one


def test_a_block_of_wan_by_hand():
    cfg, p = WAN, stripped(WAN)
    rng = np.random.default_rng(2)
    straight(cfg, p["layers"]["attn"], p["layers"])
    patch, own, shared, cross = (
        rng.normal(size=n).astype(np.float32) for n in ((16, 32), (6, 32), (6, 32), 32)
    )
    p["patch"]["kernel"], p["mod"]["bias"], p["layers"]["table"][0] = patch, shared, own
    p["layers"]["cross"]["o"]["bias"][0] = cross
    latents, t, c = inputs(WAN)
    x = plain(cfg, jax.tree.map(jnp.asarray, p), latents, t, c)[1][0][0]
    s_1, c_1, g_1, s_2, c_2, g_2 = own + shared
    y = np.asarray(video_parts.patchify(latents, cfg.patch)) @ patch
    y = y + g_1 * (ln(y) * (1 + c_1) + s_1).mean(1, keepdims=True)
    y = y + cross  # no gate
    y = y + g_2 * gelu(ln(y) * (1 + c_2) + s_2)
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_a_dual_and_a_single_block_of_hunyuan_by_hand():
    cfg, p = HUNYUAN, stripped(HUNYUAN)
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    patch, text, video_m, text_m, single_m = (
        draw(16, 32),
        draw(12, 32),
        draw(6, 32),
        draw(6, 32),
        draw(3, 32),
    )
    p["patch"]["kernel"], p["text"]["proj"]["kernel"] = patch, text
    for name, m in (("video", video_m), ("text", text_m)):
        straight(cfg, p["double"][name], p["double"][name])
        p["double"][name]["mod"]["bias"][0] = m
    one = np.eye(32, dtype=np.float32)
    p["single"]["mod"]["bias"][0] = single_m
    p["single"]["v"]["kernel"][0] = one.reshape(32, 2, 16)
    p["single"]["fc1"]["kernel"][0] = one
    p["single"]["out"]["kernel"][0] = np.concatenate([one, 3 * one])
    latents, t, c = inputs(HUNYUAN)
    c = c._replace(length=jnp.full(2, SLOTS))
    _, (xs, ys) = plain(cfg, jax.tree.map(jnp.asarray, p), latents, t, c)

    x, y = np.asarray(video_parts.patchify(latents, cfg.patch)) @ patch, np.asarray(c.text) @ text
    mean = lambda *a: np.concatenate(a, 1).mean(1, keepdims=True)
    (s_1, c_1, g_1, s_2, c_2, g_2), (u_1, d_1, h_1, u_2, d_2, h_2) = video_m, text_m
    o = mean(ln(x) * (1 + c_1) + s_1, ln(y) * (1 + d_1) + u_1)
    x, y = x + g_1 * o, y + h_1 * o
    x, y = x + g_2 * gelu(ln(x) * (1 + c_2) + s_2), y + h_2 * gelu(ln(y) * (1 + d_2) + u_2)
    np.testing.assert_allclose(xs[0], x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ys[0], y, rtol=1e-4, atol=1e-4)
    shift, scale, gate = single_m
    z = np.concatenate([x, y], 1)
    u = ln(z) * (1 + scale) + shift
    z = z + gate * (u.mean(1, keepdims=True) + 3 * gelu(u))
    np.testing.assert_allclose(xs[1], z[:, :TOKENS], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ys[1], z[:, TOKENS:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, order", [("hunyuan", "scale, shift"), ("wan", "shift, scale")])
def test_the_last_modulation_has_its_own_order(name, order):
    cfg = KINDS[name]
    p = stripped(cfg)
    first, second = np.full(32, 0.5, np.float32), np.full(32, 3.0, np.float32)
    if name == "hunyuan":
        p["mod"]["bias"] = np.stack([first, second])
    else:
        p["table"] = np.stack([first, second])
    p["out"]["kernel"][:, 0] = 1 / 32
    latents, t, c = inputs(cfg)
    v = velocity(cfg, jax.tree.map(jnp.asarray, p), latents, t, c)
    shift = second if order == "scale, shift" else first  # LN of 0 is 0: the shift alone remains
    np.testing.assert_allclose(v[0, 0, 0, 0, 0], shift[0], rtol=1e-5)


# Padding and layouts.


def test_padded_text_influences_nothing():
    params, (x, t, c) = drawn(HUNYUAN), inputs(HUNYUAN)
    other = c._replace(text=c.text.at[0, 3:].set(jnp.nan))
    np.testing.assert_array_equal(
        velocity(HUNYUAN, params, x, t, c), velocity(HUNYUAN, params, x, t, other)
    )


def test_a_row_of_a_batch_equals_it_alone_without_padding():
    params, (x, t, c) = drawn(HUNYUAN), inputs(HUNYUAN)
    whole = velocity(HUNYUAN, params, x, t, c)
    x, t, c = jax.tree.map(lambda a: a[:1], (x, t, c))
    alone = velocity(HUNYUAN, params, x, t, c._replace(text=c.text[:, :3], length=None))
    np.testing.assert_allclose(whole[:1], alone, atol=2e-5)


def test_no_text_at_all_gives_numbers():
    params, (x, t, c) = drawn(HUNYUAN), inputs(HUNYUAN)
    v = velocity(HUNYUAN, params, x, t, c._replace(length=jnp.zeros(2, int)))
    assert jnp.isfinite(v).all()


def test_the_order_of_the_tokens_changes_nothing(model):
    cfg, *arguments = model
    assert (np.diff(LAYOUT.order) != 1).any()
    ours = hooked(cfg, *by_default(cfg), *arguments)[0]
    np.testing.assert_allclose(ours, velocity(cfg, *arguments), atol=2e-5)


def test_a_layout_of_another_grid_is_refused(model):
    cfg, params, x, t, c = model
    with pytest.raises(UserError, match="of 7 video tokens, the latents have 12"):
        jax.eval_shape(
            lambda: video_dit.apply(
                params, cfg, x, t, c, layout=VideoGrid((1, 1, 7), tile=(1, 1, 7))
            )
        )


# The hook.


def test_attention_is_the_callers_and_its_layer_is_data(model):
    cfg, *arguments = model
    share, route = by_default(cfg)
    v, layers, state = hooked(cfg, share, route, *arguments)
    assert layers.tolist() == list(range(cfg.layers))
    assert int(state) == (
        101 if cfg is HUNYUAN else 101234
    )  # 1, then the modules of layers 0, 1, ... in turn
    traces = len(TRACED)
    last = hooked(cfg, share.at[-1].set(0), route, *arguments)[0]
    assert len(TRACED) == traces and jnp.abs(v - last).max() > 1e-3
    text = SLOTS if cfg is HUNYUAN else 0
    seen = {(shape, grid, n) for traced, shape, grid, n in TRACED if traced is cfg}
    assert seen == {((2, TOKENS + text, 2, 16), (2, 2, 3), text)}


def test_a_route_of_branches_is_followed_layer_by_layer(model):
    """The ops for routed attention fit the hook; another route compiles nothing."""
    cfg, *arguments = model
    share, route = by_default(cfg)
    full = hooked(cfg, share, route, *arguments)[0]
    traces = len(TRACED)
    other = hooked(cfg, share, route.at[0, 1].set(2).at[-1, 0].set(1), *arguments)[0]
    assert len(TRACED) == traces and jnp.abs(full - other).max() > 1e-3


def test_padding_rows_of_full_attention_are_zero():
    q = jnp.ones((2, 4, 1, 2))
    aux = Aux((1, 1, 2), 2, jnp.array([1, 0]))
    o = jax.jit(lambda q: video_dit.full(q, q, q, 0, aux))(q)
    assert o[..., 0, 0].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("kind, remat", [("hunyuan", "names"), ("wan", "full")])
def test_with_rematerialisation_the_gradient_is_the_slope(kind, remat):
    cfg = KINDS[kind]
    params, (x, t, c) = drawn(cfg), inputs(cfg)
    weight, step = (jax.random.normal(jax.random.key(j), x.shape) for j in range(2))
    loss = lambda v: jnp.vdot(weight, v)
    again = replace(cfg, remat=remat)
    grad = jax.jit(jax.grad(lambda x: loss(video_dit.apply(params, again, x, t, c))))
    up, down = (loss(velocity(cfg, params, x + e * step, t, c)) for e in (5e-3, -5e-3))
    np.testing.assert_allclose(jnp.vdot(grad(x), step), (up - down) / 1e-2, rtol=5e-3)


def test_bfloat16_stays_near_float32(model):
    cfg, params, x, t, c = model
    half = replace(cfg, dtype="bfloat16")
    low = jax.jit(lambda p, x, t, c: video_dit.apply(p, half, x, t, c))(params, x, t, c)
    want = velocity(cfg, params, x, t, c)
    assert low.dtype == jnp.float32
    assert jnp.sqrt(jnp.mean((low - want) ** 2)) < 0.05 * want.std()


def test_a_mesh_gives_what_one_device_gives(model):
    cfg, params, x, t, c = model
    mesh = sharding.make_mesh((1, 2, 2, 2))
    placed = sharding.place(params, sharding.shard_tree(video_dit.axes(cfg), params, mesh))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda p, x, t, c: video_dit.apply(p, cfg, x, t, c))
        out = run(placed, x, t, c)
    np.testing.assert_allclose(out, velocity(cfg, params, x, t, c), atol=2e-5)


# What is refused.


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda: replace(WAN, layers=0), "layers is 0; it must be at least 1"),
        (lambda: replace(WAN, head_dim=15), "head_dim 15 is odd"),
        (lambda: replace(HUNYUAN, rope=(4, 6, 8)), r"rope \(4, 6, 8\) must be three even numbers"),
        (lambda: replace(WAN, patch=(2, 0, 2)), "must be three sizes"),
        (lambda: replace(WAN, dtype="int8"), "dtype 'int8' is unknown"),
        (lambda: replace(WAN, remat="some"), "remat 'some' is unknown"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(change, says):
    with pytest.raises(UserError, match=says) as error:
        change()
    assert "\n" not in str(error.value)


def test_what_the_model_cannot_read_is_refused(model):
    cfg, params, x, t, c = model
    run = lambda x, c, cfg=cfg: jax.eval_shape(lambda: video_dit.apply(params, cfg, x, t, c))
    with pytest.raises(
        UserError, match="5 columns of the latents are no multiple of the patch's 2"
    ):
        run(x[..., :5], c)
    with pytest.raises(UserError, match=r"t is \[1001.0, nan\]: times lie in 0 .. 1000"):
        video_dit.apply(params, cfg, x, jnp.array([1001.0, jnp.nan]), c)
    with pytest.raises(UserError, match="latents of 3 channels: this model takes 4"):
        run(x[:, :3], c)
    for text in (c.text[:1], c.text[..., :-1]):
        with pytest.raises(UserError, match=r"Condition.text has shape .* need \(2, 5, 12\)"):
            run(x, c._replace(text=text))
    if cfg is HUNYUAN:
        with pytest.raises(UserError, match=r"Condition.pooled has shape \(2, 7\)"):
            run(x, c._replace(pooled=c.pooled[:, :7]))
        with pytest.raises(UserError, match=r"length is \[3, 6\]: the text has 5 tokens"):
            run(x, c._replace(length=jnp.array([3, 6])))
        with pytest.raises(UserError, match=r"needs Condition\.pooled"):
            run(x, c._replace(pooled=None))
        with pytest.raises(UserError, match=r"needs Condition\.guidance: guidance is True"):
            run(x, c._replace(guidance=None))
        with pytest.raises(UserError, match=r"no input for Condition\.guidance"):
            run(x, c, replace(cfg, guidance=False))
    else:
        with pytest.raises(UserError, match=r"reads no Condition\.length"):
            run(x, c._replace(length=jnp.array([1, 2])))
        with pytest.raises(UserError, match="positions is 2"):
            run(x, c, replace(cfg, positions=2))


def test_the_time_embedding_does_not_know_text_and_guidance():
    params = drawn(HUNYUAN)
    e = video_dit.time_embedding(params, HUNYUAN, jnp.array([0.0, 500.0]))
    w = params["time"]
    s = np.asarray(video_parts.sinusoid(jnp.array([0.0, 500.0]), 32))[:, 0]
    silu = lambda a: a / (1 + np.exp(-a))
    want = silu(s @ w["fc1"]["kernel"] + w["fc1"]["bias"]) @ w["fc2"]["kernel"] + w["fc2"]["bias"]
    np.testing.assert_allclose(e, want, atol=1e-5)


def test_wan_of_other_heads_rotates_what_is_left_with_the_frame():
    assert WanConfig(head_dim=64).rope == (24, 20, 20)
    assert HunyuanVideoConfig().layers == 60
