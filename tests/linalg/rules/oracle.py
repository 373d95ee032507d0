"""The merging rules by their definitions on whole (m, n) matrices, in NumPy float64; nothing is shared with the library."""

import numpy as np

TOL = 1e-9


def svd(matrix, most=None):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = int((s > TOL * s[0]).sum()) if len(s) and s[0] > 0 else 0
    rank = rank if most is None else min(rank, most)
    return u[:, :rank], s[:rank], vt[:rank]


def polar(matrix):
    u, _, vt = svd(matrix)
    return u @ vt


def core_ranks(updates):
    """(K_out, K_in): dimensions of all column spaces together and of all row spaces together."""
    scaled = [update / max(np.linalg.norm(update), 1e-300) for update in updates]
    return len(svd(np.concatenate(scaled, axis=1))[1]), len(svd(np.concatenate(scaled))[1])


def axes(updates):
    """Orthonormal rows (output side, input side): singular vectors of the balanced factors of unit-norm updates."""
    sides = ([], [])
    for update in updates:
        if not np.any(update):
            continue
        u, s, vt = svd(update)
        roots = np.sqrt(s / np.linalg.norm(s))[:, None]
        sides[0].append(roots * u.T)
        sides[1].append(roots * vt)
    found = []
    for rows in sides:
        vt = svd(np.concatenate(rows))[2]
        peaks = vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)]
        found.append(vt * np.sign(peaks)[:, None])
    return found


def task_arithmetic(updates):
    return sum(updates)


def mean(updates):
    return sum(updates) / len(updates)


def elect(entries):
    """Entry by entry: mean of those whose sign is that of the sum."""
    sign = np.sign(entries.sum(axis=0))
    agrees = np.sign(entries) == sign
    agrees &= entries != 0
    return (entries * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)


def trim(entries, density):
    kept = max(1, int(density * entries[0].size))
    result = np.zeros_like(entries)
    for before, after in zip(entries, result, strict=True):
        chosen = np.argsort(-np.abs(before).ravel(), kind="stable")[:kept]
        after.ravel()[chosen] = before.ravel()[chosen]
    return result


def ties(updates, density=0.2):
    out, in_side = axes(updates)
    entries = np.stack([out @ update @ in_side.T for update in updates])
    return out.T @ elect(trim(entries, density)) @ in_side


def knots(updates, density=0.2):
    u, s, vt = svd(np.concatenate(updates, axis=1))
    own = np.stack(np.split(vt, len(updates), axis=1))
    return (u * s) @ elect(trim(own, density))


def iso_c(updates):
    u, s, vt = svd(sum(updates))
    return s.mean() * u @ vt


def iso_cts(updates, common_share=0.8):
    q, n_tasks = min(core_ranks(updates)), len(updates)
    d = round((q - int(common_share * q)) / n_tasks)
    u_c, s_c, v_c = svd(sum(updates), q - n_tasks * d)
    lefts, values, rights = [u_c], [s_c], [v_c]
    for update in updates:
        rest = update - u_c @ u_c.T @ update
        if d and np.linalg.norm(rest) > 1e-8 * np.linalg.norm(update):
            u, s, vt = svd(rest, d)
            lefts.append(u), values.append(s), rights.append(vt)
    level = np.concatenate(values).mean()
    return level * polar(np.concatenate(lefts, axis=1)) @ polar(np.concatenate(rights).T).T


def tsv(updates):
    most = max(1, min(core_ranks(updates)) // len(updates))
    parts = [svd(update, most) for update in updates]
    left = polar(np.concatenate([part[0] for part in parts], axis=1))
    right = polar(np.concatenate([part[2] for part in parts]).T).T
    return left @ np.diag(np.concatenate([part[1] for part in parts])) @ right


def boosting(updates, beta=0.01):
    u, s, vt = svd(sum(updates))
    k = int(np.argmax(np.cumsum(s) / s.sum() >= beta))
    return (u * np.maximum(s, s[k])) @ vt


def svc(updates, alpha=0.1):
    u, s, vt = svd(sum(updates))
    new = []
    for r in range(len(s)):
        responses = []
        for update in updates:
            along = u[:, r] @ update
            overlap = s[r] * vt[r] @ along
            responses.append(overlap / (along @ along) if np.linalg.norm(along) > 1e-8 else 0.0)
        new.append(s[r] * len(updates) / sum(max(alpha, response) for response in responses))
    return (u * np.array(new)) @ vt


def pico(updates):
    """Calibrated by the singular vectors of the concatenated balanced B factors, then added up; the mean norm."""
    parts = [svd(update) for update in updates]
    stacked = np.concatenate([u * np.sqrt(s) for u, s, _ in parts], axis=1)
    directions, s, _ = svd(stacked)
    shares = s**2 / (s**2).sum()
    change = (directions * (1 / (1 + (len(updates) - 1) * shares) - 1)) @ directions.T
    total = sum(update + change @ update for update in updates)
    return total * np.mean([np.linalg.norm(update) for update in updates]) / np.linalg.norm(total)


def wudi(updates, ridge=1e-3):
    grams = [update.T @ update / np.linalg.norm(update) ** 2 for update in updates]
    rho = ridge * np.trace(sum(grams)) / core_ranks(updates)[1]
    goal = sum(update @ gram for update, gram in zip(updates, grams, strict=True)) + rho * sum(updates)
    return goal @ np.linalg.inv(sum(grams) + rho * np.eye(updates[0].shape[1]))


def regmean(updates, moments, ridge=1e-4):
    """Without shrinking; `moments` (T, n, n) are those of inputs within the span of the row spaces."""
    in_side = axes(updates)[1]
    rho = ridge * np.trace(in_side @ sum(moments) @ in_side.T) / len(in_side)
    goal = sum(update @ moment for update, moment in zip(updates, moments, strict=True)) + rho * mean(updates)
    return goal @ np.linalg.inv(sum(moments) + rho * np.eye(updates[0].shape[1]))


def compress(updates, n_components, beta=0.25, passes=500):
    """HOOI on whole matrices, from the higher-order singular value decomposition."""
    norms = [np.linalg.norm(update) for update in updates]
    levels = [beta * norm + (1 - beta) * np.mean(norms) for norm in norms]
    equal = [update * level / norm for update, level, norm in zip(updates, levels, norms, strict=True)]

    def leading(matrices):
        return np.linalg.svd(np.concatenate(matrices))[2][:n_components]

    q, p = leading(equal), leading([update.T for update in equal])
    for _ in range(passes):
        p = leading([(update @ q.T).T for update in equal])
        q = leading([p @ update for update in equal])
    return p.T @ p @ sum(updates) @ q.T @ q
