"""Exact checks of the policy cliff, numbered as in its theory; all in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.errors import ConfigError, DataError
from uncollapse.policy.policy_cliff import (
    TokenTree,
    audit_completions,
    audit_rewards,
    cliff_profile,
    effective_reward,
    gibbs_tv,
    incomplete_reward,
    inverse_bellman,
    policy_distance,
    policy_lipschitz,
    policy_value,
    regularisation_price,
    soft_policy_bound,
    soft_solve,
    solve_mdp,
    span_bound,
    stability_radius,
    state_tv,
    tanh_bound,
    tie_break_reward,
    value_bound,
    weight_bound,
)
from uncollapse.policy.policy_cliff.verdict import summarise

seeds = st.integers(0, 10_000)
quick = settings(max_examples=15, deadline=None)
GAMMA = 0.9


def garnet(
    seed: int, states: int = 8, actions: int = 4, branching: int = 3
) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Random rewards in [0, 1], and from each (s, a) a few random successors."""
    rng = np.random.default_rng(seed)
    P = np.zeros((states, actions, states))
    for s, a in itertools.product(range(states), range(actions)):
        P[s, a, rng.choice(states, branching, replace=False)] = rng.dirichlet(np.ones(branching))
    return rng.uniform(size=(states, actions)), P, rng


def value_iteration(R: np.ndarray, P: np.ndarray, gamma: float, alpha: float = 0.0) -> np.ndarray:
    """Naive reference: Q by thousands of backups in loops over states."""
    Q = np.zeros_like(R)
    for _ in range(int(40 / (1 - gamma))):
        if alpha:
            V = np.array([q.max() + alpha * math.log(np.exp((q - q.max()) / alpha).sum()) for q in Q])
        else:
            V = Q.max(1)
        Q = R + gamma * P @ V
    return Q


def sparse(P: np.ndarray) -> sp.csr_matrix:
    return sp.csr_matrix(P.reshape(-1, P.shape[2]))


def tied_mdp(ties: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A random MDP in which actions 0..ties-1 are the best of state 0, and all tie."""
    Q, P, _ = garnet(seed, actions=7)
    Q[0, :ties] = 2.0
    return inverse_bellman(Q, P, GAMMA), P


# solvers ----------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, gamma=st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_00_solvers_agree_with_value_iteration(seed: int, gamma: float) -> None:
    R, P, _ = garnet(seed)
    hard, soft = solve_mdp(R, P, gamma), soft_solve(R, P, gamma, 0.2)
    np.testing.assert_allclose(hard.Q, value_iteration(R, P, gamma), atol=1e-10)
    np.testing.assert_allclose(hard.Q, R + gamma * P @ hard.V, atol=1e-11)
    np.testing.assert_allclose(soft.Q, value_iteration(R, P, gamma, 0.2), atol=1e-10)
    np.testing.assert_allclose(soft.policy.sum(1), 1, atol=1e-12)
    thin = sparse(P)
    np.testing.assert_allclose(solve_mdp(R, thin, gamma).Q, hard.Q, atol=1e-10)
    np.testing.assert_allclose(soft_solve(R, thin, gamma, 0.2).Q, soft.Q, atol=1e-10)
    np.testing.assert_allclose(
        stability_radius(R, thin, gamma).rho, stability_radius(R, P, gamma).rho, rtol=1e-8
    )


@quick
@given(seed=seeds)
def test_00_values_and_soft_policies_are_lipschitz(seed: int) -> None:
    R, P, rng = garnet(seed)
    change = rng.uniform(-1, 1, R.shape) * 0.05
    delta = np.abs(change).max()
    assert np.abs(solve_mdp(R + change, P, GAMMA).Q - solve_mdp(R, P, GAMMA).Q).max() <= value_bound(
        delta, GAMMA
    ) * (1 + 1e-12)
    for alpha in (0.05, 0.3):
        one, two = soft_solve(R, P, GAMMA, alpha), soft_solve(R + change, P, GAMMA, alpha)
        moved = state_tv(one.policy, two.policy)
        assert (moved <= span_bound(one.Q, two.Q, alpha) + 1e-12).all()
        assert (
            span_bound(one.Q, two.Q, alpha) <= tanh_bound(np.abs(one.Q - two.Q).max(), alpha) + 1e-12
        ).all()
        assert moved.max() <= soft_policy_bound(delta, alpha, GAMMA)


def test_00_kl_regularisation_with_a_uniform_base_is_the_entropy_case() -> None:
    R, P, rng = garnet(3)
    alpha, actions = 0.2, R.shape[1]
    entropy = soft_solve(R, P, GAMMA, alpha)
    uniform = soft_solve(R, P, GAMMA, alpha, np.full(R.shape, 1 / actions))
    np.testing.assert_allclose(uniform.policy, entropy.policy, atol=1e-12)
    shift = alpha * math.log(actions) / (1 - GAMMA)
    np.testing.assert_allclose(entropy.V - uniform.V, shift, atol=1e-10)
    base = rng.dirichlet(np.ones(actions), len(R))
    base[0, 1] = 0.0
    base[0] /= base[0].sum()
    found = soft_solve(R, P, GAMMA, alpha, base)
    assert found.policy[0, 1] == 0
    V = alpha * np.log((base * np.exp(np.where(base > 0, found.Q, 0.0) / alpha)).sum(1))
    np.testing.assert_allclose(found.V, V, atol=1e-11)
    np.testing.assert_allclose((R + GAMMA * P @ V)[base > 0], found.Q[base > 0], atol=1e-11)
    assert soft_policy_bound(1e-3, alpha, GAMMA) == pytest.approx(1e-3 / (2 * alpha * (1 - GAMMA)))


def test_00_the_soft_solution_is_stable_at_small_temperatures() -> None:
    R, P, _ = garnet(4)
    hard = solve_mdp(R, P, GAMMA)
    cold = soft_solve(R, P, GAMMA, 1e-4 * float(np.abs(hard.Q).max()))
    np.testing.assert_allclose(cold.policy, hard.uniform, atol=1e-4)
    np.testing.assert_allclose(cold.V, hard.V, atol=1e-6)


def test_00_probabilities_near_one_are_exact() -> None:
    # logits of 10^4 and more, where exp(logit - log sum exp) is good to 10^-12 only
    R, P = np.array([[10.0, 10.0 - 2e-2]]), np.ones((1, 2, 1))
    for gamma in (0.0, 0.9):
        policy = soft_solve(R, P, gamma, 1e-3).policy[0]
        assert 1 - policy[0] == pytest.approx(1 / (1 + math.exp(20)), rel=1e-6)
        assert policy.sum() == pytest.approx(1, abs=1e-15)
    law = TokenTree(2, 1).gibbs(R[0], 1e-3).law
    assert 1 - law[0] == pytest.approx(1 / (1 + math.exp(20)), rel=1e-6)


def test_00_ten_thousand_states_are_solved_sparse() -> None:
    rng = np.random.default_rng(0)
    states, actions = 10_000, 3
    columns = rng.integers(0, states, states * actions * 3)
    weights = rng.dirichlet(np.ones(3), states * actions).ravel()
    P = sp.csr_matrix((weights, columns, np.arange(0, len(columns) + 1, 3)), (states * actions, states))
    R = rng.uniform(size=(states, actions))
    hard, soft = solve_mdp(R, P, 0.99), soft_solve(R, P, 0.99, 0.3)
    V = 0.3 * np.log(np.exp(soft.Q / 0.3 - soft.Q.max() / 0.3).sum(1)) + soft.Q.max()
    for Q, value in ((hard.Q, hard.V), (soft.Q, V)):
        np.testing.assert_allclose(Q, R + 0.99 * (P @ value).reshape(R.shape), rtol=1e-11)
    radius = stability_radius(R, P, 0.99)
    at = solve_mdp(R + (1 + 1e-3) * (radius.witness - R), P, 0.99, tolerance=1e-13)
    assert 0.005 * hard.gaps.min() <= radius.rho <= 0.5 * hard.gaps.min() * (1 + 1e-6)
    assert (at.policy != hard.policy).any()


# 1 ----------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, eps=st.sampled_from([1e-6, 1e-2, 0.5]))
def test_01_inverse_bellman(seed: int, eps: float) -> None:
    Q, P, rng = garnet(seed)
    Q = rng.normal(size=Q.shape)
    R = inverse_bellman(Q, P, GAMMA)
    np.testing.assert_allclose(solve_mdp(R, P, GAMMA).Q, Q, atol=1e-10)
    R0, P = tied_mdp(3, seed)
    moved = tie_break_reward(R0, P, GAMMA, 0, 1, eps)
    assert np.abs(moved - R0).max() <= (1 + GAMMA) * eps * (1 + 1e-6)
    after = solve_mdp(moved, P, GAMMA)
    expected = solve_mdp(R0, P, GAMMA).Q
    expected[0, 1] += eps
    np.testing.assert_allclose(after.Q, expected, atol=1e-10)
    assert after.tie_sets[0].tolist() == [False, True] + [False] * 5


# 2 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", range(2, 7))
@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.1])
def test_02_the_jump_does_not_shrink_with_eps(ties: int, eps: float) -> None:
    R, P = tied_mdp(ties)
    before = solve_mdp(R, P, GAMMA)
    assert before.tie_sizes[0] == ties
    after = solve_mdp(tie_break_reward(R, P, GAMMA, 0, ties - 1, eps), P, GAMMA)
    assert state_tv(before.uniform, after.uniform)[0] == pytest.approx((ties - 1) / ties, abs=1e-12)
    assert state_tv(before.deterministic, after.deterministic)[0] == 1


def test_02_only_a_tie_can_be_broken() -> None:
    R, P = tied_mdp(2)
    with pytest.raises(ConfigError, match="not tied at state 0, where the best is 0, 1"):
        tie_break_reward(R, P, GAMMA, 0, 5, 0.1)
    with pytest.raises(ConfigError, match="above 0"):
        tie_break_reward(R, P, GAMMA, 0, 1, 0.0)


def test_02_the_tie_set_never_grows_abruptly() -> None:
    R, P = tied_mdp(3)
    before = solve_mdp(R, P, GAMMA).tie_sets
    rng = np.random.default_rng(0)
    for _ in range(20):
        after = solve_mdp(R + 1e-5 * rng.uniform(-1, 1, R.shape), P, GAMMA).tie_sets
        assert not (after & ~before).any()


# 3 ----------------------------------------------------------------------------------------------------------------


def twin_chain(up: float) -> tuple[np.ndarray, np.ndarray]:
    P = np.zeros((3, 2, 3))
    P[0, 0, 1] = P[0, 1, 2] = 1
    P[1, :, 1] = P[2, :, 2] = 1
    return np.array([[up, -up], [up, up], [-up, -up]]), P


@pytest.mark.parametrize(("gamma", "expected"), [(0.9, 0.0049998333), (0.99, 0.0498339973)])
def test_03_the_twin_chain_reaches_the_bound(gamma: float, expected: float) -> None:
    alpha, d = 0.1, 1e-4
    still, P = twin_chain(0.0)
    moved, _ = twin_chain(d)
    one, two = soft_solve(still, P, gamma, alpha), soft_solve(moved, P, gamma, alpha)
    common = gamma * alpha * math.log(2) / (1 - gamma)
    np.testing.assert_allclose(one.Q[0], common, atol=1e-11)
    np.testing.assert_allclose(two.Q[0] - common, [d / (1 - gamma), -d / (1 - gamma)], atol=1e-11)
    tv = state_tv(one.policy, two.policy)[0]
    assert tv == pytest.approx(0.5 * math.tanh(d / (alpha * (1 - gamma))), abs=1e-10)
    assert tv == pytest.approx(expected, abs=5e-11)
    ratios = []
    for small in (1e-3, 1e-4, 1e-5):
        there = soft_solve(twin_chain(small)[0], P, gamma, alpha)
        ratios.append(state_tv(one.policy, there.policy)[0] / (small / (2 * alpha * (1 - gamma))))
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(1, abs=1e-3)
    # the constant at R = 0 is the bound itself
    exact, bound = policy_lipschitz(still, P, gamma, alpha)
    assert exact[0] == pytest.approx(bound, rel=1e-10)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_03_the_hard_twin_chain_has_the_weakest_radius(gamma: float) -> None:
    _, P = twin_chain(0.0)
    gain = 0.3
    R = np.array([[gain, 0.0], [0.0, -np.inf], [0.0, -np.inf]])
    rho, pair, witness = stability_radius(R, P, gamma)
    assert rho == pytest.approx(gain * (1 - gamma) / 2, rel=1e-10)
    assert pair == (0, 1)
    assert np.isneginf(witness[1:, 1]).all()
    real = np.isfinite(R)
    assert np.abs(witness[real] - R[real]).max() == pytest.approx(rho)
    with_duplicates = stability_radius(np.array([[gain, 0.0], [0.0, 0.0], [0.0, 0.0]]), P, gamma)
    assert with_duplicates.rho == 0


# 4 ----------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, alpha=st.sampled_from([0.01, 0.1, 1.0]))
def test_04_the_price_of_temperature(seed: int, alpha: float) -> None:
    R, P, _ = garnet(seed)
    hard, soft = solve_mdp(R, P, GAMMA), soft_solve(R, P, GAMMA, alpha)
    price = regularisation_price(alpha, R.shape[1], GAMMA)
    for cost in (soft.V - hard.V, hard.V - policy_value(R, P, GAMMA, soft.policy)):
        assert (cost >= -1e-11).all()
        assert (cost <= price + 1e-11).all()
    flat = np.ones_like(R)
    gained = soft_solve(flat, P, GAMMA, alpha).V - solve_mdp(flat, P, GAMMA).V
    np.testing.assert_allclose(gained, price, rtol=1e-10)


# 5 ----------------------------------------------------------------------------------------------------------------


def test_05_without_discounting_states_are_bandits() -> None:
    R, P, _ = garnet(5)
    logits = R / 0.3
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(soft_solve(R, P, 0.0, 0.3).policy, expected, atol=1e-12)
    gaps = solve_mdp(R, P, 0.0).gaps
    assert stability_radius(R, P, 0.0).rho == pytest.approx(gaps.min() / 2, rel=1e-12)
    for state in range(len(R)):
        alone = np.eye(len(R))[state]
        # every state reaches only itself
        stay = np.tile(np.eye(len(R))[:, None], (1, R.shape[1], 1))
        assert stability_radius(R, stay, 0.0, alone).reachable == pytest.approx(gaps[state] / 2, rel=1e-12)


# 6 ----------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, vocab=st.integers(2, 4), depth=st.integers(1, 4))
def test_06_gibbs_identity(seed: int, vocab: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    tree = TokenTree(vocab, depth)
    reward = rng.normal(size=(2, tree.leaves))
    base = np.log(rng.dirichlet(np.ones(tree.leaves), 2))
    for alpha in (0.05, 1.0):
        for log_base in (np.zeros_like(base), base):
            weight = np.exp(log_base + (reward - reward.max()) / alpha)
            expected = weight / weight.sum(1, keepdims=True)
            found = tree.gibbs(reward, alpha, None if not log_base.any() else log_base)
            np.testing.assert_allclose(found.law, expected, atol=1e-12)
            total = alpha * np.log(weight.sum(1)) + reward.max()
            np.testing.assert_allclose(found.V[0][:, 0], total, atol=1e-10)
    warm = tree.gibbs(reward, 1e9).law
    np.testing.assert_allclose(warm, 1 / tree.leaves, atol=1e-7)


def test_06_cold_trees_count_answers_not_tokens() -> None:
    tree = TokenTree(3, 3)
    reward = np.zeros(27)
    for token, count in enumerate((3, 4, 3)):
        reward[9 * token : 9 * token + count] = 1
    assert tree.optimal_answers(reward) == 10
    np.testing.assert_allclose(tree.cold(reward).policy[0][0], [0.3, 0.4, 0.3], atol=1e-12)
    np.testing.assert_allclose(tree.gibbs(reward, 1e-3).policy[0][0], [0.3, 0.4, 0.3], atol=1e-12)
    np.testing.assert_allclose(tree.hard(reward).policy[0][0], 1 / 3, atol=1e-12)
    base = np.log(np.arange(1.0, 28) / np.arange(1, 28).sum())
    weight = np.arange(1.0, 28) * reward
    np.testing.assert_allclose(tree.cold(reward, base).law, weight / weight.sum(), atol=1e-12)
    np.testing.assert_allclose(tree.gibbs(reward, 1e-3, base).law, weight / weight.sum(), atol=1e-12)


def test_06_a_tree_is_an_mdp() -> None:
    tree, rng = TokenTree(2, 3), np.random.default_rng(0)
    gamma, alpha = 0.8, 0.3
    rewards = [rng.normal(size=2 ** (t + 1)) for t in range(3)]
    # nodes 1..7 in heap order, 8 states with 0 the absorbing end
    R, P = np.zeros((8, 2)), np.zeros((8, 2, 8))
    R[0, 1] = -np.inf
    P[0, :, 0] = 1
    for node in range(1, 8):
        depth = node.bit_length() - 1
        for token in range(2):
            child = 2 * node + token
            R[node, token] = rewards[depth][child - 2 ** (depth + 1)]
            P[node, token, child if child < 8 else 0] = 1
    reference, found = soft_solve(R, P, gamma, alpha), tree.soft(rewards, alpha, gamma)
    policies = np.concatenate([level.reshape(-1, 2) for level in found.policy])
    np.testing.assert_allclose(policies, reference.policy[1:], atol=1e-12)
    np.testing.assert_allclose(found.V[0][0], reference.V[1], atol=1e-12)
    zero = tree.soft(rewards, alpha, 0.0)
    np.testing.assert_allclose(zero.V[0][0], alpha * np.log(np.exp(rewards[0] / alpha).sum()), atol=1e-12)


@quick
@given(seed=seeds, depth=st.integers(1, 5), delta=st.sampled_from([1e-3, 0.1, 1.0]))
def test_06_sequence_tv_does_not_grow_with_depth(seed: int, depth: int, delta: float) -> None:
    rng = np.random.default_rng(seed)
    tree, alpha = TokenTree(2, depth), 0.2
    reward = rng.normal(size=tree.leaves)
    change = delta * rng.choice([-1.0, 1.0], tree.leaves)
    one, two = tree.gibbs(reward, alpha), tree.gibbs(reward + change, alpha)
    assert 0.5 * np.abs(one.law - two.law).sum() <= tanh_bound(delta, alpha) + 1e-12
    for t in range(depth):
        assert np.abs(one.V[t] - two.V[t]).max() <= delta + 1e-12
        assert (state_tv(one.policy[t], two.policy[t]) <= tanh_bound(delta, alpha) + 1e-12).all()
    flat = [delta * np.ones(2 ** (t + 1)) for t in range(depth)]
    moved = tree.soft(flat, alpha, 0.9).V[0] - tree.soft([0.0 * f for f in flat], alpha, 0.9).V[0]
    assert moved[0] == pytest.approx(delta * tree.value_constants(0.9)[0])


def test_06_missing_answers_and_batches() -> None:
    tree, rng = TokenTree(3, 2), np.random.default_rng(0)
    reward = rng.normal(size=(4, 5, 9))
    reward[..., 6:] = -np.inf
    for found in (tree.gibbs(reward, 0.5), tree.cold(reward), tree.hard(reward)):
        assert not found.law[..., 6:].any()
        np.testing.assert_allclose(found.law.sum(-1), 1, atol=1e-12)
        assert np.isfinite(found.policy[1]).all()
    np.testing.assert_allclose(
        tree.gibbs(reward, 0.5).law[2, 3], tree.gibbs(reward[2, 3], 0.5).law, atol=1e-15
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenTree(0, 3), "at least 1 token"),
        (lambda: TokenTree(2, 2).gibbs(np.zeros(3), 1.0), "4 answers"),
        (lambda: TokenTree(2, 2).gibbs(np.full(4, np.nan), 1.0), "NaN"),
        (lambda: TokenTree(2, 2).gibbs(np.full(4, -np.inf), 1.0), "no answer"),
        (lambda: TokenTree(2, 2).gibbs(np.zeros(4), 0.0), "above 0"),
        (lambda: TokenTree(2, 2).soft([np.zeros(2)], 1.0), "1 rewards per token for 2"),
        (lambda: TokenTree(2, 2).soft([np.zeros(2), np.zeros(3)], 1.0), "4 prefixes"),
    ],
)
def test_06_trees_refuse(call: object, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        call()  # type: ignore[operator]


# 7, 8 -------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_07_constants_and_potentials_change_nothing(seed: int) -> None:
    R, P, rng = garnet(seed)
    potential = rng.normal(size=len(R))
    shaped = R + GAMMA * P @ potential - potential[:, None]
    hard, soft, rho = solve_mdp(R, P, GAMMA), soft_solve(R, P, GAMMA, 0.2), stability_radius(R, P, GAMMA).rho
    for other in (R + 7.5, shaped):
        after = solve_mdp(other, P, GAMMA)
        assert (after.policy == hard.policy).all()
        np.testing.assert_allclose(after.gaps, hard.gaps, atol=1e-9)
        np.testing.assert_allclose(stability_radius(other, P, GAMMA).rho, rho, rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(soft_solve(other, P, GAMMA, 0.2).policy, soft.policy, atol=1e-9)


@quick
@given(seed=seeds, scale=st.sampled_from([0.1, 3.0]))
def test_08_scaling(seed: int, scale: float) -> None:
    R, P, _ = garnet(seed)
    one, many = stability_radius(R, P, GAMMA), stability_radius(scale * R, P, GAMMA)
    assert many.rho == pytest.approx(scale * one.rho, rel=1e-8)
    assert many.pair == one.pair
    alpha = 0.2
    soft, scaled = soft_solve(R, P, GAMMA, alpha), soft_solve(scale * R, P, GAMMA, scale * alpha)
    np.testing.assert_allclose(soft.policy, scaled.policy, atol=1e-11)
    np.testing.assert_allclose(
        policy_lipschitz(scale * R, P, GAMMA, scale * alpha).per_state,
        policy_lipschitz(R, P, GAMMA, alpha).per_state / scale,
        rtol=1e-8,
    )


# 9: the radius ----------------------------------------------------------------------------------------------------


def naive_radius(R: np.ndarray, P: np.ndarray, gamma: float) -> float:
    """The definition with S x A occupancies in loops."""
    solved = solve_mdp(R, P, gamma)
    states, actions = R.shape
    under = np.array([P[s, solved.policy[s]] for s in range(states)])
    M = np.linalg.inv(np.eye(states) - gamma * under)

    def occupancy(weights: np.ndarray) -> np.ndarray:
        found = np.zeros((states, actions))
        found[np.arange(states), solved.policy] = weights @ M
        return found

    least = np.inf
    for s, b in itertools.product(range(states), range(actions)):
        if b == solved.policy[s]:
            continue
        c = occupancy(np.eye(states)[s]) - gamma * occupancy(P[s, b])
        c[s, b] -= 1
        assert (c * R).sum() == pytest.approx(solved.V[s] - solved.Q[s, b], abs=1e-10)
        least = min(least, (c * R).sum() / np.abs(c).sum())
    return float(least)


@quick
@given(seed=seeds, gamma=st.sampled_from([0.5, 0.9, 0.97]))
def test_09_the_radius_is_exact_and_bracketed(seed: int, gamma: float) -> None:
    R, P, rng = garnet(seed)
    solved = solve_mdp(R, P, gamma)
    rho, _, witness = stability_radius(R, P, gamma)
    assert rho == pytest.approx(naive_radius(R, P, gamma), rel=1e-8)
    assert (1 - gamma) / 2 * solved.gaps.min() <= rho * (1 + 1e-9)
    assert rho <= (R.max() - R.min()) / 2
    for factor, changes in ((1 - 1e-6, False), (1 + 1e-6, True)):
        moved = solve_mdp(R + factor * (witness - R), P, gamma, tolerance=1e-14)
        assert (moved.policy != solved.policy).any() == changes
    signs = rng.choice([-1.0, 1.0], (40, *R.shape))
    for sign in signs:
        assert (solve_mdp(R + 0.999 * rho * sign, P, gamma).policy == solved.policy).all()


def test_09_behaviour_is_bracketed_by_two_radii() -> None:
    for seed in range(20):
        R, P, _ = garnet(seed, branching=1)
        mu = np.eye(len(R))[0]
        found = stability_radius(R, P, GAMMA, mu)
        assert found.reachable is not None
        assert found.rho <= found.reachable
        everywhere = stability_radius(R, P, GAMMA, np.full(len(R), 1 / len(R)))
        assert everywhere.reachable == everywhere.rho


def test_09_reached_states_are_found_by_search() -> None:
    chain = np.zeros((6, 2, 6))
    chain[np.arange(6), 0, np.minimum(np.arange(6) + 1, 4)] = 1
    chain[:, 1, 5] = 1
    R = np.array([[1.0, 0.0]] * 4 + [[1.0, 0.5]] + [[1.0, 1.0 - 1e-6]])
    start = np.eye(6)[0]
    for P in (chain, sparse(chain)):
        found = stability_radius(R, P, 0.0, start)
        assert found.rho == pytest.approx(5e-7)
        assert found.reachable == pytest.approx(0.25)


def test_09_nothing_to_choose_has_no_radius() -> None:
    rho, pair, witness = stability_radius(np.zeros((2, 1)), np.full((2, 1, 2), 0.5), GAMMA)
    assert rho == math.inf
    assert pair is None
    assert not witness.any()


# 10 ---------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_10_effective_reward(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rewards, change = rng.normal(size=(2, 3, 5, 4))
    weights = rng.dirichlet(np.ones(3), 5)
    mixed = effective_reward(rewards, weights)
    naive = sum(weights[:, k, None] * rewards[k] for k in range(3))
    np.testing.assert_allclose(mixed, naive, atol=1e-14)
    moved = np.abs(effective_reward(rewards + change, weights) - mixed).max()
    assert moved <= np.abs(change).max() + 1e-12
    same = np.broadcast_to(change[0], change.shape)
    identical = np.abs(effective_reward(rewards + same, weights) - mixed).max()
    assert identical == pytest.approx(np.abs(change[0]).max())
    np.testing.assert_array_equal(effective_reward(rewards, np.array([0.0, 1.0, 0.0])), rewards[1])
    others = rng.dirichlet(np.ones(3), 5)
    shift = np.abs(effective_reward(rewards, others) - mixed).max()
    assert shift <= weight_bound(rewards, weights, others) + 1e-12
    assert weight_bound(rewards + 100.0, weights, others) == pytest.approx(
        weight_bound(rewards, weights, others)
    )


def test_10_a_reward_without_weight_takes_no_action_away() -> None:
    rewards = np.array([[[1.0, 2.0], [3.0, 4.0]], [[-np.inf, 5.0], [6.0, -np.inf]]])
    for k in range(2):
        np.testing.assert_array_equal(effective_reward(rewards, np.eye(2)[k]), rewards[k])
    mixed = effective_reward(rewards, np.array([[1.0, 0.0], [0.5, 0.5]]))
    np.testing.assert_array_equal(mixed, [[1.0, 2.0], [4.5, -np.inf]])
    both = np.array([[0.5, 0.5]] * 2), np.array([[0.25, 0.75]] * 2)
    assert weight_bound(rewards, *both) == pytest.approx(0.75)
    assert weight_bound(rewards, both[0], np.array([1.0, 0.0])) == math.inf
    assert weight_bound(rewards, np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0.0


def test_10_the_weight_bound_is_reached() -> None:
    rewards = np.array([[[0.0, 1.0]], [[5.0, 1.0]]])
    one, two = np.array([0.8, 0.2]), np.array([0.3, 0.7])
    moved = np.abs(effective_reward(rewards, one) - effective_reward(rewards, two)).max()
    assert moved == pytest.approx(weight_bound(rewards, one, two)) == pytest.approx(2.5)


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [1.0]])
def test_10_weights_are_a_mixture(weights: list[float]) -> None:
    with pytest.raises(DataError, match="weights"):
        effective_reward(np.zeros((2, 3, 2)), np.array(weights))


# 11 ---------------------------------------------------------------------------------------------------------------


def test_11_a_duplicate_action() -> None:
    R, P, _ = garnet(11)
    solved, rho = solve_mdp(R, P, GAMMA), stability_radius(R, P, GAMMA).rho
    best = solved.policy[2]
    worst = int(solved.Q[2].argmin())
    for action, radius, size in ((best, 0.0, 2), (worst, rho, 1)):
        twice_R = np.concatenate([R, np.full((len(R), 1), -np.inf)], 1)
        twice_P = np.concatenate([P, P[:, :1]], 1)
        twice_R[2, -1], twice_P[2, -1] = R[2, action], P[2, action]
        after = solve_mdp(twice_R, twice_P, GAMMA)
        assert after.tie_sizes[2] == size
        found = stability_radius(twice_R, twice_P, GAMMA)
        assert found.rho == pytest.approx(radius, rel=1e-8)
        soft = soft_solve(twice_R, twice_P, GAMMA, 0.2).policy
        assert soft[2, -1] == pytest.approx(soft[2, action], rel=1e-10)
        assert not soft[:2, -1].any()
    tied = stability_radius(*tied_mdp(3), GAMMA)
    assert tied.rho == 0
    assert tied.pair == (0, 1)


# 12: the Lipschitz constant ---------------------------------------------------------------------------------------


def naive_jacobian(R: np.ndarray, P: np.ndarray, gamma: float, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """d pi / dR as (S, A, S A), from the inverse on pairs; and pi."""
    pi = soft_solve(R, P, gamma, alpha).policy
    states, actions = R.shape
    pairs = np.einsum("sat,tb->satb", P, pi).reshape(states * actions, -1)
    M = np.linalg.inv(np.eye(states * actions) - gamma * pairs).reshape(states, actions, -1)
    return pi[..., None] * (M - np.einsum("sa,sax->sx", pi, M)[:, None]) / alpha, pi


def largest_over_subsets(jacobian: np.ndarray) -> float:
    count = len(jacobian)
    sets = itertools.chain.from_iterable(itertools.combinations(range(count), r) for r in range(count))
    return max(float(np.abs(jacobian[list(chosen)].sum(0)).sum()) for chosen in sets)


@quick
@given(seed=seeds, alpha=st.sampled_from([0.02, 0.1, 1.0]))
def test_12_the_lipschitz_constant_is_exact(seed: int, alpha: float) -> None:
    R, P, rng = garnet(seed)
    per_state, bound = policy_lipschitz(R, P, GAMMA, alpha)
    jacobian, _ = naive_jacobian(R, P, GAMMA, alpha)
    expected = [largest_over_subsets(one) for one in jacobian]
    np.testing.assert_allclose(per_state, expected, rtol=1e-9, atol=1e-10)
    assert per_state.max() <= bound
    # finite differences along the worst direction reach it, no other direction exceeds it
    state = int(per_state.argmax())
    sets = [list(c) for r in range(1, 4) for c in itertools.combinations(range(4), r)]
    worst = max(sets, key=lambda chosen: np.abs(jacobian[state][chosen].sum(0)).sum())
    direction = np.sign(jacobian[state][worst].sum(0)).reshape(R.shape)
    step = 1e-5 * alpha
    for sign, equal in ((direction, True), (rng.choice([-1.0, 1.0], R.shape), False)):
        moved = soft_solve(R + step * sign, P, GAMMA, alpha).policy
        back = soft_solve(R - step * sign, P, GAMMA, alpha).policy
        rate = 0.5 * np.abs(moved - back).sum(1)[state] / (2 * step)
        assert rate <= per_state[state] * (1 + 1e-4)
        if equal:
            assert rate == pytest.approx(per_state[state], rel=1e-4)


def test_12_the_softmax_jacobian() -> None:
    rng = np.random.default_rng(0)
    alpha = 0.7
    for p in (rng.dirichlet(np.ones(6)), np.array([0.5, 0.3, 0.2]), np.array([0.7, 0.2, 0.1])):
        R = alpha * np.log(p)[None]
        constant = 2 * policy_lipschitz(R, np.ones((1, len(p), 1)), 0.0, alpha).per_state[0]
        masses = [sum(c) for r in range(len(p)) for c in itertools.combinations(p, r)]
        assert constant == pytest.approx(max(4 * m * (1 - m) for m in masses) / alpha, rel=1e-12)
        assert constant <= 1 / alpha + 1e-12
        assert (constant == pytest.approx(1 / alpha, rel=1e-9)) == any(abs(m - 0.5) < 1e-9 for m in masses)


def test_12_many_actions_get_a_lower_bound() -> None:
    R, P, _ = garnet(1, states=6, actions=15)
    found = policy_lipschitz(R, P, GAMMA, 0.1)
    assert not found.exact.any()
    jacobian, _ = naive_jacobian(R, P, GAMMA, 0.1)
    exact = largest_over_subsets(jacobian[0])
    assert 0.98 * exact <= found.per_state[0] <= exact * (1 + 1e-9)
    # actions that do not exist do not count
    R[:, 4:] = -np.inf
    few = policy_lipschitz(R, P, GAMMA, 0.1)
    assert few.exact.all()
    np.testing.assert_allclose(few.per_state, policy_lipschitz(R[:, :4], P[:, :4], GAMMA, 0.1).per_state)
    thin = policy_lipschitz(R, sparse(P), GAMMA, 0.1)
    np.testing.assert_allclose(thin.per_state, few.per_state, rtol=1e-8)


# distances, profiles, incomplete rewards --------------------------------------------------------------------------


def test_13_incomplete_rewards_cost() -> None:
    R, P = tied_mdp(3)
    policy = solve_mdp(R, P, GAMMA).policy
    missing = np.zeros_like(R)
    missing[0, 2] = 0.5
    mu = np.full(len(R), 1 / len(R))
    found = incomplete_reward(R, missing, P, GAMMA, mu)
    assert policy[0] == 0
    assert np.argwhere(found.improves).tolist() == [[0, 2]]
    assert found.advantage[0, 2] == pytest.approx(0.5)
    assert found.regret[0] >= 0.5 - 1e-9
    nothing = incomplete_reward(R, np.zeros_like(R), P, GAMMA)
    assert not nothing.improves.any()
    np.testing.assert_allclose(nothing.regret, 0, atol=1e-10)


def test_13_occupancy_sees_only_what_is_reached() -> None:
    P = np.zeros((2, 2, 2))
    P[0, :, 0] = P[1, :, 1] = 1
    one, two = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    start = np.array([1.0, 0.0])
    assert policy_distance(one, two) == 1
    assert policy_distance(one, two, "occupancy", P=P, gamma=GAMMA, mu=start) == pytest.approx(0, abs=1e-15)
    assert policy_distance(one, two, "occupancy", P=P, gamma=GAMMA) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="needs P"):
        policy_distance(one, two, "occupancy")
    with pytest.raises(DataError, match="shapes"):
        policy_distance(one, two[:1])


def test_13_cliff_and_slope() -> None:
    R, P = tied_mdp(4)
    direction = tie_break_reward(R, P, GAMMA, 0, 1, 1.0) - R
    rows = cliff_profile(R, P, GAMMA, direction, (1e-6, 1e-4), (0.3, 0.1))
    hard = [row for row in rows if row.alpha == 0]
    assert [row.tv for row in hard] == pytest.approx([0.75, 0.75])
    assert [row.alpha for row in rows] == [0, 0, 0.1, 0.1, 0.3, 0.3]
    for small, large in zip(rows[2::2], rows[3::2], strict=True):
        assert large.tv / small.tv == pytest.approx(100, rel=1e-2)
        assert large.tv <= large.bound
    assert hard[0].value > rows[2].value > rows[4].value
    assert hard[0].entropy < rows[2].entropy < rows[4].entropy


# bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.0}, "TokenTree"),
        ({"gamma": -0.1}, "outside"),
        ({"P": np.zeros((2, 2, 3))}, "P has shape"),
        ({"P": np.zeros((2, 2, 2))}, "no distribution"),
        ({"P": np.array([[[2.0, -1.0]] * 2] * 2)}, "no distribution"),
        ({"P": np.full((2, 2, 2), np.nan)}, "no distribution"),
        ({"R": np.full((2, 2), np.nan)}, "NaN"),
        ({"R": np.array([[0.0, 1.0], [-np.inf, -np.inf]])}, "state 1 has no action"),
        ({"tolerance": -1.0}, "negative"),
    ],
)
def test_14_bad_problems(change: dict, message: str) -> None:
    given = {"R": np.zeros((2, 2)), "P": np.full((2, 2, 2), 0.5), "gamma": GAMMA} | change
    with pytest.raises((ConfigError, DataError), match=message):
        solve_mdp(**given)


def test_14_bad_temperatures_and_bases() -> None:
    R, P = np.zeros((2, 2)), np.full((2, 2, 2), 0.5)
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="temperature"):
            soft_solve(R, P, GAMMA, alpha)
    with pytest.raises(DataError, match="no distribution"):
        soft_solve(R, P, GAMMA, 1.0, np.ones((2, 2)))
    with pytest.raises(DataError, match="mu has shape"):
        stability_radius(R, P, GAMMA, np.ones(3))


def test_14_rows_of_missing_actions_are_not_read() -> None:
    P = np.full((2, 2, 2), 0.5)
    P[0, 1] = np.nan
    R = np.array([[1.0, -np.inf], [0.0, 1.0]])
    assert np.isfinite(solve_mdp(R, P, GAMMA).V).all()
    assert np.isfinite(solve_mdp(R, sparse(P), GAMMA).V).all()
    assert soft_solve(R, P, GAMMA, 0.1).policy[0].tolist() == [1, 0]


# the audit --------------------------------------------------------------------------------------------------------


def naive_worst_tv(reward: np.ndarray, shift: float, alpha: float, base: np.ndarray) -> float:
    """All sign changes of size shift."""
    worst = 0.0
    for signs in itertools.product((-1.0, 1.0), repeat=len(reward)):
        changed = reward + shift * np.array(signs)
        worst = max(worst, float(gibbs_tv(reward, changed, alpha, np.log(base))))
    return worst


@quick
@given(seed=seeds, shift=st.sampled_from([0.0, 0.01, 0.3]), alpha=st.sampled_from([0.03, 1.0]))
def test_15_the_audit_against_loops(seed: int, shift: float, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (6, 7, 2)) / 2
    scores[0, 3:] = np.nan
    scores[1, :, 1] = np.nan
    scores[2, 1:] = np.nan
    scores[3][rng.uniform(size=(7, 2)) < 0.5] = np.nan
    answer = rng.integers(0, 5, (6, 7))
    weights = [1.0, 0.25]
    found = audit_rewards(scores, weights, alpha, shift=shift, answer=answer)
    for i in range(6):
        rows = [j for j in range(7) if not np.isnan(scores[i, j]).all()]
        names = sorted({int(answer[i, j]) for j in rows})
        groups = [[j for j in rows if answer[i, j] == name] for name in names]
        assert found.completions[i] == len(rows)
        assert found.answers[i] == len(groups)
        if not groups:
            assert np.isnan([found.best[i], found.gap[i], found.soft_tv[i], found.expected[i]]).all()
            assert found.ties[i] == 0
            continue
        reward = np.array([np.nansum(scores[i, g] * weights, 1).mean() for g in groups])
        base = np.array([float(len(g)) for g in groups])
        assert found.best[i] == pytest.approx(reward.max())
        assert found.ties[i] == (reward > reward.max() - 1e-9).sum()
        for k in range(2):
            known = [[x for x in scores[i, g, k] if not np.isnan(x)] for g in groups]
            each = np.array([np.mean(one) for one in known if one])
            assert found.ties_by_reward[i, k] == (sum(each > each.max() - 1e-9) if len(each) else 0)
        law = base * np.exp((reward - reward.max()) / alpha)
        law /= law.sum()
        assert found.expected[i] == pytest.approx(law @ reward)
        assert found.entropy[i] == pytest.approx(-(law[law > 0] * np.log(law[law > 0])).sum(), abs=1e-12)
        if len(groups) < 2:
            assert np.isnan(found.gap[i])
            assert found.soft_tv[i] == 0
            continue
        top = np.sort(reward)[::-1]
        assert found.gap[i] == pytest.approx(top[0] - top[1], abs=1e-12)
        assert found.flip[i] == found.gap[i] / 2
        assert found.exact[i]
        assert found.soft_tv[i] == pytest.approx(naive_worst_tv(reward, shift, alpha, base), abs=1e-12)
        assert found.soft_tv[i] <= found.bound + 1e-12


@quick
@given(seed=seeds)
def test_15_many_answers_get_a_lower_bound_that_is_close(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.uniform(size=(3, 60, 1))
    found = audit_rewards(scores, alpha=0.3, shift=0.05)
    assert not found.exact.any()
    assert (found.soft_tv <= found.bound).all()
    assert (found.soft_tv >= 0.99 * found.bound).all()
    few = audit_rewards(scores[:, :12], alpha=0.3, shift=0.05)
    assert few.exact.all()


@quick
@given(seed=seeds, scale=st.sampled_from([0.01, 50.0]))
def test_15_order_padding_and_scale(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (5, 6, 1)) / 4
    one = audit_rewards(scores, alpha=0.2, shift=0.03)
    order = rng.permutation(6)
    padded = np.concatenate([scores[:, order], np.full((5, 3, 1), np.nan)], 1)
    other = audit_rewards(padded, alpha=0.2, shift=0.03)
    scaled = audit_rewards(scale * scores, alpha=0.2 * scale, shift=0.03 * scale)
    shifted = audit_rewards(scores + 3.0, alpha=0.2, shift=0.03)
    rows = rng.permutation(30)
    prompt = np.repeat(np.arange(5), 6)
    flat = audit_completions(prompt[rows], scores.reshape(-1, 1)[rows], alpha=0.2, shift=0.03)
    for again in (other, scaled, shifted, flat):
        np.testing.assert_array_equal(again.ties, one.ties)
        np.testing.assert_allclose(again.soft_tv, one.soft_tv, atol=1e-10)
        np.testing.assert_allclose(again.hard_tv, one.hard_tv, atol=1e-12)
        np.testing.assert_allclose(again.entropy, one.entropy, atol=1e-10)
    np.testing.assert_allclose(scaled.gap, scale * one.gap, atol=1e-10)
    np.testing.assert_array_equal(other.worst_first(), one.worst_first())


def test_15_known_numbers() -> None:
    scores = np.array([[1, 1, 1, 0], [1, 0.5, 0, 0], [1, 1 - 1e-3, 0, 0]], dtype=float)[..., None]
    found = audit_rewards(scores, alpha=0.1, shift=0.01)
    assert found.ties.tolist() == [3, 1, 1]
    np.testing.assert_allclose(found.flip, [0, 0.25, 5e-4])
    np.testing.assert_allclose(found.hard_tv, [2 / 3, 0, 1])
    np.testing.assert_allclose(found.outside_gap, [1, 0.5, 1e-3])
    assert found.worst_first().tolist() == [0, 2, 1]
    assert found.bound == pytest.approx(math.tanh(0.05))
    likely = audit_rewards(scores, alpha=0.1, base_logp=np.log([[0.5, 0.2, 0.2, 0.1]] * 3))
    law = np.array([0.5, 0.2, 0.2, 0.1]) * np.exp(scores[0, :, 0] / 0.1)
    assert likely.expected[0] == pytest.approx((law / law.sum()) @ scores[0, :, 0])


def test_15_rounding_of_float32_decides_no_tie() -> None:
    parts = np.array([[[0.7, 0.3], [1.0, 0.0], [0.1, 0.9]]], dtype=np.float32)
    found = audit_rewards(parts)
    assert found.ties.tolist() == [3]
    assert found.tolerance.tolist() == [pytest.approx(1e-6)]
    large = np.array([[[1000.3, -1000.0], [0.3, 0.0], [0.2, 0.0]]], dtype=np.float32)
    found = audit_rewards(large)
    assert found.ties.tolist() == [2]
    assert found.tolerance[0] == pytest.approx(2000.3e-6, rel=1e-6)
    assert audit_rewards(parts, tolerance=1e-9).ties.tolist() == [2]
    loose = audit_rewards(np.array([[[1.0], [0.96], [0.9]], [[np.nan]] * 3]), tolerance=0.05)
    assert loose.ties.tolist() == [2, 0]
    np.testing.assert_array_equal(loose.tolerance, [0.05, np.nan])


def test_15_at_the_boundary_an_answer_joins_the_best_and_does_not_take_over() -> None:
    # a gap of 0.2, once as 0.3 - 0.1, which floats make smaller, and once as 0.2 - 0
    for rewards, moved in (
        ([0.3, 0.1], 1 / 2),
        ([0.2, 0.0], 1 / 2),
        ([0.2, 0.0, 0.0, -1.0], 2 / 3),
        ([0.3, 0.3, 0.1], 1 / 2),  # breaking the tie moves as far
        ([0.2, 0.2, 0.0, 0.0, 0.0], 3 / 5),
        ([0.21, 0.0], 0.0),
        ([0.19, 0.0], 1.0),
        ([0.19, 0.19, 0.0], 1.0),
    ):
        found = audit_rewards(np.array(rewards)[None, :, None], shift=0.1)
        assert found.hard_tv[0] == pytest.approx(moved, abs=1e-15)
        unique = found.ties[0] == 1
        assert summarise(found).flipped == int(unique and moved > 0)
    still = audit_rewards(np.array([[[0.2], [0.0]], [[0.2], [0.2]]]), shift=0.0)
    assert still.hard_tv.tolist() == [0.0, 0.0]


@quick
@given(seed=seeds, shift=st.sampled_from([0.125, 0.25, 0.375]))
def test_15_the_hard_move_against_all_changes(seed: int, shift: float) -> None:
    reward = np.random.default_rng(seed).integers(0, 4, 4) / 4
    best = reward == reward.max()
    worst = 0.0
    for change in itertools.product((-shift, 0.0, shift), repeat=4):
        now = reward + np.array(change)
        moved = now == now.max()
        worst = max(worst, 0.5 * np.abs(best / best.sum() - moved / moved.sum()).sum())
    assert audit_rewards(reward[None, :, None], shift=shift).hard_tv[0] == pytest.approx(worst, abs=1e-12)


def test_15_every_domain_has_rewards_of_its_own() -> None:
    nan = np.nan
    scores = np.array(
        [[[1, nan], [1, nan], [0, nan]], [[nan, 0.5], [nan, 0.2], [nan, nan]], [[nan, nan]] * 3]
    )
    found = audit_rewards(scores, [1.0, 2.0])
    assert found.completions.tolist() == [3, 2, 0]
    assert found.ties.tolist() == [2, 1, 0]
    assert found.ties_by_reward.tolist() == [[2, 0], [0, 1], [0, 0]]
    np.testing.assert_allclose(found.best, [1.0, 1.0, nan])
    np.testing.assert_allclose(found.gap, [0.0, 0.6, nan])


def test_15_weights_of_each_prompt() -> None:
    rng = np.random.default_rng(0)
    scores, weights = rng.normal(size=(4, 5, 3)), rng.dirichlet(np.ones(3), 4)
    found = audit_rewards(scores, weights)
    for i in range(4):
        alone = audit_rewards(scores[i : i + 1], weights[i])
        assert found.ties_by_reward[i].tolist() == alone.ties_by_reward[0].tolist()
        for name in ("best", "gap", "soft_tv", "expected"):
            assert getattr(found, name)[i] == pytest.approx(getattr(alone, name)[0])
    for wrong in (weights[:3], np.where(np.arange(4)[:, None] == 2, 0.0, weights)):
        with pytest.raises(ConfigError, match="for each prompt"):
            audit_rewards(scores, wrong)


def test_15_one_huge_reward_ties_nothing_elsewhere() -> None:
    found = audit_rewards(np.array([[[1e12], [0.0]], [[0.2], [0.1]]]))
    assert found.ties.tolist() == [1, 1]
    cold = audit_rewards(np.array([[[1e300], [0.0]]]), alpha=1e-12)
    assert cold.expected[0] == 1e300


def test_15_empty_tables() -> None:
    nothing = audit_rewards(np.zeros((0, 3, 1)))
    assert len(nothing.ties) == 0
    unscored = audit_rewards(np.full((2, 3, 1), np.nan))
    assert unscored.ties.tolist() == [0, 0]
    assert np.isnan(unscored.soft_tv).all()
    assert len(audit_completions(np.zeros(0, dtype=int), np.zeros((0, 2))).ties) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.0}, "temperature"),
        ({"shift": -1.0}, "shift"),
        ({"shift": math.nan}, "shift"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": math.inf}, "tolerance"),
        ({"weights": [1.0, 2.0]}, "do not fit"),
        ({"weights": [0.0]}, "not all 0"),
        ({"scores": np.full((1, 2, 1), np.inf)}, "infinite"),
        ({"scores": np.zeros((1, 2, 0))}, "no reward"),
        ({"scores": np.full((1, 2, 1), 1e308), "weights": [1e3]}, "overflows"),
        ({"base_logp": np.array([[0.0, np.nan]])}, "not finite"),
    ],
)
def test_15_the_audit_refuses(change: dict, message: str) -> None:
    given = {"scores": np.zeros((1, 2, 1))} | change
    with pytest.raises((ConfigError, DataError), match=message):
        audit_rewards(**given)


def test_15_prompt_numbers_fit() -> None:
    with pytest.raises(DataError, match="prompt numbers"):
        audit_completions(np.array([0, -1]), np.zeros((2, 1)))
    with pytest.raises(DataError, match="number of them all"):
        audit_completions(np.array([0, 2]), np.zeros((2, 1)), prompts=2)
