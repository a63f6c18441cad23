"""What docs/attention.md says, in float64 NumPy: one query at a time, only the keys it sees, gradients by hand."""

import numpy as np

EMPTY_LSE = -1e30


def attend(q, k, v, visible):
    """o [B,T,N,G,D] and lse [B,T,N,G] of q [B,T,N,G,D] over the keys [B,S,N,D] that visible [B,T,N,S] marks."""
    o, lse = np.zeros(q.shape), np.full(q.shape[:-1], EMPTY_LSE)
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = visible[b, t, n]
        if seen.any():
            logits = q[b, t, n] @ k[b, seen, n].T / np.sqrt(q.shape[-1])
            lse[b, t, n] = np.logaddexp.reduce(logits, axis=-1)
            o[b, t, n] = np.exp(logits - lse[b, t, n][:, None]) @ v[b, seen, n]
    return o, lse


def attend_gradient(q, k, v, visible, do, dlse):
    """Gradients of sum(o * do) + sum(lse * dlse) in q, k, v."""
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    o, lse = attend(q, k, v, visible)
    scale = 1 / np.sqrt(q.shape[-1])
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = visible[b, t, n]
        if seen.any():
            row = b, t, n
            p = np.exp(q[row] @ k[b, seen, n].T * scale - lse[row][:, None])
            delta = (do[row] * o[row]).sum(-1) - dlse[row]
            dlogits = p * (do[row] @ v[b, seen, n].T - delta[:, None]) * scale
            dq[row] = dlogits @ k[b, seen, n]
            dk[b, seen, n] += dlogits.T @ q[row]
            dv[b, seen, n] += p.T @ do[row]
    return dq, dk, dv


def compressed_visible(q, blocks, *, block_size, q_offset, lengths):
    """Which of the complete blocks each query sees, [B,T,N,blocks]."""
    visible = np.zeros((*q.shape[:3], blocks), bool)
    for b, row, j in np.ndindex(q.shape[0], q.shape[1], blocks):
        t, last_key = q_offset + row, (j + 1) * block_size - 1
        visible[b, row, :, j] = last_key <= t and last_key < lengths[b] and t < lengths[b]
    return visible


def selected_visible(q, keys, block_indices, *, block_size, q_offset, lengths):
    """Which keys lie in a query's blocks and not after it, [B,T,N,S]."""
    visible = np.zeros((*q.shape[:3], keys), bool)
    for b, row, n in np.ndindex(*q.shape[:3]):
        t = q_offset + row
        for j in block_indices[b, row, n]:
            for key in range(j * block_size, (j + 1) * block_size) if j >= 0 else ():
                if key <= t < lengths[b]:
                    visible[b, row, n, key] = True
    return visible


def window_visible(q, keys, *, window_size, q_offset, lengths):
    """Keys t-w+1 ... t, [B,T,N,S]."""
    visible = np.zeros((*q.shape[:3], keys), bool)
    for b, row in np.ndindex(*q.shape[:2]):
        t = q_offset + row
        if t < lengths[b]:
            visible[b, row, :, max(t - window_size + 1, 0) : t + 1] = True
    return visible


def prefix_visible(q, keys, count, lengths):
    """The first min(count, lengths) keys, [B*Q,Lt,N,S], of q [B,Q,Lt,N,G,D], count [B,Q,Lt] and lengths [B,Q]."""
    visible = np.zeros((q.shape[0] * q.shape[1], *q.shape[2:4], keys), bool)
    for b, row, t in np.ndindex(*q.shape[:3]):
        visible[b * q.shape[1] + row, t, :, : max(min(count[b, row, t], lengths[b, row]), 0)] = True
    return visible


def block_means(x, block_size):
    """Means of the complete blocks, [B,S//s,N,D]."""
    blocks = x.shape[1] // block_size
    whole = x[:, : blocks * block_size].reshape(x.shape[0], blocks, block_size, *x.shape[2:])
    return whole.mean(axis=2)


def block_means_gradient(dmeans, keys, block_size):
    """Gradient of `block_means` in its argument of `keys` keys."""
    dx = np.zeros((dmeans.shape[0], keys, *dmeans.shape[2:]))
    for j in range(dmeans.shape[1]):
        dx[:, j * block_size : (j + 1) * block_size] = dmeans[:, j : j + 1] / block_size
    return dx


def block_importance(q, k_blocks, *, block_size, q_offset, lengths):
    """Compressed attention's probabilities summed over a KV head's query heads, [B,T,N,M]; 0 where not visible."""
    visible = compressed_visible(q, k_blocks.shape[1], block_size=block_size, q_offset=q_offset, lengths=lengths)
    importance = np.zeros(visible.shape)
    _, lse = attend(q, k_blocks, k_blocks, visible)
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = visible[b, t, n]
        logits = q[b, t, n] @ k_blocks[b, seen, n].T / np.sqrt(q.shape[-1])
        importance[b, t, n, seen] = np.exp(logits - lse[b, t, n][:, None]).sum(0)
    return importance


def forced_blocks(t, *, block_size, init_blocks, local_blocks):
    """The blocks that a query at t takes whatever their importance."""
    current = t // block_size
    first = {j for j in range(init_blocks) if j <= current}
    last = {j for j in range(current - local_blocks + 1, current + 1) if j >= 0}
    return first | last | {current}


def block_selection(q, k_blocks, *, block_size, block_count, q_offset, lengths, init_blocks=0, local_blocks=1):
    """Chosen blocks [B,T,N,n], ascending, -1 at the end."""
    importance = block_importance(q, k_blocks, block_size=block_size, q_offset=q_offset, lengths=lengths)
    chosen = np.full((*q.shape[:3], block_count), -1, np.int32)
    for b, row, n in np.ndindex(*q.shape[:3]):
        t = q_offset + row
        if t >= lengths[b]:
            continue
        forced = forced_blocks(t, block_size=block_size, init_blocks=init_blocks, local_blocks=local_blocks)
        others = [j for j in range(t // block_size + 1) if j not in forced]
        others.sort(key=lambda j, weight=importance[b, row, n]: (-weight[j], j))
        taken = sorted(forced | set(others[: block_count - len(forced)]))
        chosen[b, row, n, : len(taken)] = taken
    return chosen


def nsa(q, k, v, gate_logits, block_indices, do=None, *, block_size, window_size, q_offset, lengths, branches, **rest):
    """The gated sum, or with `do` the gradients of sum(o * do) in q, k, v and gate_logits."""
    gate_temperature = rest.get("gate_temperature", 0.3)
    place = {"q_offset": q_offset, "lengths": lengths}
    k_blocks, v_blocks = block_means(k, block_size), block_means(v, block_size)
    parts = (
        (k_blocks, v_blocks, compressed_visible(q, k_blocks.shape[1], block_size=block_size, **place)),
        (k, v, selected_visible(q, k.shape[1], block_indices, block_size=block_size, **place)),
        (k, v, window_visible(q, k.shape[1], window_size=window_size, **place)),
    )
    valid = (q_offset + np.arange(q.shape[1]))[None] < np.asarray(lengths)[:, None]
    gates = 1 / (1 + np.exp(-np.where(valid[..., None, None, None], gate_logits, 0) / gate_temperature))
    o, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    dgate_logits = np.zeros(gate_logits.shape)
    for i, branch in enumerate(("compressed", "selected", "window")):
        if branch not in branches:
            continue
        keys, values, visible = parts[i]
        branch_o, _ = attend(q, keys, values, visible)
        gate = gates[..., i, None]
        o += gate * branch_o
        if do is None:
            continue
        dlse = np.zeros(q.shape[:-1])
        branch_dq, dkeys, dvalues = attend_gradient(q, keys, values, visible, gate * do, dlse)
        if branch == "compressed":
            dkeys, dvalues = (block_means_gradient(x, k.shape[1], block_size) for x in (dkeys, dvalues))
        dq, dk, dv = dq + branch_dq, dk + dkeys, dv + dvalues
        slope = gates[..., i] * (1 - gates[..., i]) / gate_temperature
        dgate_logits[..., i] = np.where(valid[..., None, None], slope * (branch_o * do).sum(-1), 0)
    return o if do is None else (dq, dk, dv, dgate_logits)
