"""The functions that ``atlas_kernels.compat`` replaces, as their authors' code has them, random draws and side effects
included, with one difference: nothing is moved to CUDA."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CIFAR10_MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
CIFAR10_STD = torch.tensor([0.2471, 0.2435, 0.2616]).view(3, 1, 1)
LOWER, UPPER = (0 - CIFAR10_MEAN) / CIFAR10_STD, (1 - CIFAR10_MEAN) / CIFAR10_STD


def kl_sum(model, x_adv, x):
    return F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")


def signed_steps(loss_of, x_adv, x, step_size, epsilon, steps):
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(x_adv), [x_adv])
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - epsilon), x + epsilon), 0.0, 1.0)
    return x_adv.detach()


def l2_steps(model, x, epsilon, steps):
    """TRADES in l_2: SGD on the perturbation."""
    delta = (0.001 * torch.randn(x.shape)).to(x.dtype).requires_grad_()
    sgd = torch.optim.SGD([delta], lr=epsilon / steps * 2)
    for _ in range(steps):
        sgd.zero_grad()
        (-kl_sum(model, x + delta, x)).backward()
        norms = delta.grad.view(len(x), -1).norm(p=2, dim=1)
        delta.grad.div_(norms.view(-1, 1, 1, 1))
        if (norms == 0).any():
            delta.grad[norms == 0] = torch.randn_like(delta.grad[norms == 0])
        sgd.step()
        delta.data.add_(x)
        delta.data.clamp_(0, 1).sub_(x)
        delta.data.renorm_(p=2, dim=0, maxnorm=epsilon)
    return (x + delta).detach()


def trades_loss(
    model, x_natural, y, optimizer, step_size=0.003, epsilon=0.031, perturb_steps=10, beta=1.0, distance="l_inf"
):
    model.eval()
    x_adv = x_natural.detach() + 0.001 * torch.randn(x_natural.shape)
    if distance == "l_inf":
        x_adv = signed_steps(lambda v: kl_sum(model, v, x_natural), x_adv, x_natural, step_size, epsilon, perturb_steps)
    else:
        x_adv = l2_steps(model, x_natural, epsilon, perturb_steps)
    model.train()
    x_adv = torch.clamp(x_adv, 0.0, 1.0)
    optimizer.zero_grad()
    natural = F.cross_entropy(model(x_natural), y)
    return natural + beta * (1.0 / len(x_natural)) * kl_sum(model, x_adv, x_natural)


def mart_loss(
    model, x_natural, y, optimizer, step_size=0.007, epsilon=0.031, perturb_steps=10, beta=6.0, distance="l_inf"
):
    model.eval()
    x_adv = x_natural.detach() + 0.001 * torch.randn(x_natural.shape)
    x_adv = signed_steps(lambda v: F.cross_entropy(model(v), y), x_adv, x_natural, step_size, epsilon, perturb_steps)
    model.train()
    optimizer.zero_grad()
    p, z_adv = F.softmax(model(x_natural), 1), model(torch.clamp(x_adv, 0.0, 1.0))
    q = F.softmax(z_adv, 1)
    order = torch.argsort(q, dim=1)
    wrong = torch.where(order[:, -1] == y, order[:, -2], order[:, -1])
    boosted = F.cross_entropy(z_adv, y) + F.nll_loss(torch.log(1.0001 - q + 1e-12), wrong)
    kl = F.kl_div(torch.log(q + 1e-12), p, reduction="none").sum(1)
    return boosted + beta * (kl * (1.0000001 - p.gather(1, y[:, None])[:, 0])).sum() / len(y)


def cw_loss(output, target, confidence=50, num_classes=10):
    hot = F.one_hot(target, output.shape[1])  # published: num_classes, which there is the same
    other = ((1 - hot) * output - hot * 10000.0).max(1)[0]
    return -torch.clamp((hot * output).sum(1) - other + confidence, min=0.0).sum()


def eval_robust(model, test_loader, perturb_steps, epsilon, step_size, loss_fn, category, random):
    return evaluate(
        test_loader,
        model,
        lambda X, y: GA_PGD(model, X, y, epsilon, step_size, perturb_steps, loss_fn, category, random)[0] - X,
    )


def GA_PGD(model, data, target, epsilon, step_size, num_steps, loss_fn, category, rand_init):
    model.eval()
    kappa = torch.zeros(len(data))
    x_adv = data.detach()
    if category == "trades":
        x_adv = x_adv + 0.001 * torch.randn(data.shape) if rand_init else x_adv
    else:
        if rand_init:
            x_adv = x_adv + torch.from_numpy(np.random.uniform(-epsilon, epsilon, data.shape)).float()
        x_adv = torch.clamp(x_adv, 0.0, 1.0)

    def loss_of(v):
        output = model(v)
        for i, prediction in enumerate(output.max(1)[1]):
            kappa[i] += int(prediction == target[i])
        if loss_fn == "kl":
            return F.kl_div(F.log_softmax(output, 1), F.softmax(model(data), 1), reduction="sum")
        return F.cross_entropy(output, target) if loss_fn == "cent" else cw_loss(output, target)

    return signed_steps(loss_of, x_adv, data, step_size, epsilon, num_steps), kappa


def mixup_data(x, y, alpha=1.0):
    lam = np.random.beta(alpha, alpha) if alpha > 0 else 1
    index = torch.randperm(x.size()[0])
    return lam * x + (1 - lam) * x[index, :], y, y[index], lam


def mixup_criterion(criterion, pred, y_a, y_b, lam):
    return lam * criterion(pred, y_a) + (1 - lam) * criterion(pred, y_b)


def diff_in_weights(model, proxy):
    diff, new = {}, proxy.state_dict()
    for name, old in model.state_dict().items():
        if old.ndim > 1 and "weight" in name:
            d = new[name] - old
            diff[name] = old.norm() / (d.norm() + 1e-20) * d
    return diff


def add_into_weights(model, diff, coeff=1.0):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in diff:
                weight.add_(coeff * diff[name])


def GAIR(num_steps, Kappa, Lambda, func):
    half = int(num_steps / 2)
    if func == "Discrete":
        weights = ((num_steps + 1) - Kappa) / (num_steps + 1)
    else:
        score = Lambda + (half - Kappa) * 5 / half
        weights = (score.tanh() + 1) / 2 if func == "Tanh" else score.sigmoid()
    return weights * len(weights) / weights.sum()


def clamp(X, lower_limit, upper_limit):
    return torch.max(torch.min(X, upper_limit), lower_limit)


def _restarts(X, y, restarts, iters, start, forward, loss_of, move, stop):
    """What the attacks of fast_adversarial and robust_overfitting share."""
    max_loss, max_delta = torch.zeros(len(y)), torch.zeros_like(X)
    for _ in range(restarts):
        delta = start()
        for _ in range(iters):
            delta.requires_grad_()
            output = forward(X + delta)
            index = torch.where(output.max(1)[1] == y)[0] if stop else torch.arange(len(y))
            if len(index) == 0:
                break
            (grad,) = torch.autograd.grad(loss_of(output, delta).mean(), delta)
            delta = delta.detach().clone()
            delta[index] = move(delta[index], grad[index], X[index])
        delta = delta.detach()
        all_loss = loss_of(forward(X + delta), None).detach()
        max_delta[all_loss >= max_loss] = delta[all_loss >= max_loss]
        max_loss = torch.max(max_loss, all_loss)
    return max_delta


def fast_cifar_pgd(model, X, y, epsilon, alpha, attack_iters, restarts, opt=None):
    def start():
        delta = torch.zeros_like(X)
        for i in range(len(epsilon)):
            delta[:, i, :, :].uniform_(-epsilon[i][0][0].item(), epsilon[i][0][0].item())
        return clamp(delta, LOWER - X, UPPER - X)

    def move(d, g, x):
        return clamp(clamp(d + alpha * g.sign(), -epsilon, epsilon), LOWER - x, UPPER - x)

    def loss_of(output, _):
        return F.cross_entropy(output, y, reduction="none")

    return _restarts(X, y, restarts, attack_iters, start, model, loss_of, move, True)


def fast_mnist_pgd(model, X, y, epsilon, alpha, attack_iters, restarts):
    def start():
        return clamp(torch.zeros_like(X).uniform_(-epsilon, epsilon), 0 - X, 1 - X)

    def move(d, g, x):
        return clamp(torch.clamp(d + alpha * g.sign(), -epsilon, epsilon), 0 - x, 1 - x)

    def loss_of(output, _):
        return F.cross_entropy(output, y, reduction="none")

    return _restarts(X, y, restarts, attack_iters, start, model, loss_of, move, True)


def attack_fgsm(model, X, y, epsilon):
    delta = torch.zeros_like(X, requires_grad=True)
    (grad,) = torch.autograd.grad(F.cross_entropy(model(X + delta), y), delta)
    return epsilon * grad.sign()


def evaluate(test_loader, model, attack):
    model.eval()
    loss, right, n = 0.0, 0, 0
    for X, y in test_loader:
        output = model(X + attack(X, y)).detach()
        loss += F.cross_entropy(output, y).item() * len(y)
        right += (output.max(1)[1] == y).sum().item()
        n += len(y)
    return loss / n, right / n


def rice_pgd(
    model, X, y, epsilon, alpha, attack_iters, restarts, norm, early_stop=False, mixup=False, y_a=None, y_b=None,
    lam=None,
):  # fmt: skip
    def forward(x):
        return model((x - CIFAR10_MEAN) / CIFAR10_STD)

    def start():
        delta = torch.zeros_like(X)
        if norm == "l_inf":
            delta.uniform_(-epsilon, epsilon)
        else:
            delta.normal_()
            n = delta.view(len(X), -1).norm(p=2, dim=1).view(-1, 1, 1, 1)
            delta *= torch.zeros_like(n).uniform_(0, 1) / n * epsilon
        return clamp(delta, 0 - X, 1 - X)

    def move(d, g, x):
        if norm == "l_inf":
            d = torch.clamp(d + alpha * g.sign(), min=-epsilon, max=epsilon)
        else:
            g = g / (g.view(len(g), -1).norm(dim=1).view(-1, 1, 1, 1) + 1e-10)
            d = (d + g * alpha).view(len(d), -1).renorm(p=2, dim=0, maxnorm=epsilon).view_as(d)
        return clamp(d, 0 - x, 1 - x)

    def loss_of(output, delta):
        if not mixup:
            return F.cross_entropy(output, y, reduction="none")
        if delta is not None:
            output = forward(X + delta)  # once more
        first, second = (F.cross_entropy(output, labels, reduction="none") for labels in (y_a, y_b))
        return lam * first + (1 - lam) * second

    return _restarts(X, y, restarts, attack_iters, start, forward, loss_of, move, early_stop)


class AWP:
    """AdvWeightPerturb and, with clean inputs, TradesAWP."""

    def __init__(self, model, proxy, proxy_optim, gamma):
        self.model, self.proxy, self.optim, self.gamma = model, proxy, proxy_optim, gamma

    def calc_awp(self, inputs_adv, targets, inputs_clean=None, beta=None):
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        if inputs_clean is None:
            loss = F.cross_entropy(self.proxy(inputs_adv), targets)
        else:
            loss = F.cross_entropy(self.proxy(inputs_clean), targets)
            loss = loss + beta * kl_sum(self.proxy, inputs_adv, inputs_clean) / len(targets)
        self.optim.zero_grad()
        (-loss).backward()
        self.optim.step()
        return diff_in_weights(self.model, self.proxy)


def perturb_input(model, x_natural, step_size=0.003, epsilon=0.031, perturb_steps=10, distance="l_inf"):
    model.eval()
    if distance == "l_2":
        return l2_steps(model, x_natural, epsilon, perturb_steps)
    x_adv = x_natural.detach() + 0.001 * torch.randn(x_natural.shape)
    return signed_steps(lambda v: kl_sum(model, v, x_natural), x_adv, x_natural, step_size, epsilon, perturb_steps)


class JacobianReg(nn.Module):
    def __init__(self, n=1):
        super().__init__()
        self.n = n

    def forward(self, x, y):
        B, C = y.shape
        count, total = C if self.n == -1 else self.n, 0
        for k in range(count):
            if self.n == -1:
                v = torch.eye(C)[k].expand(B, C)
            else:
                v = torch.randn(B, C) if C > 1 else torch.ones(B, C)
                v = v / torch.norm(v, 2, 1, True)
            (jv,) = torch.autograd.grad(y.reshape(-1), x, v.reshape(-1).to(y.dtype), create_graph=True)
            total = total + C * torch.norm(jv) ** 2 / (count * B)
        return total / 2
