// The update rules, one element at a time. Formulas and order of operations: src/optim/oracle.rs, which decides every bit.
#pragma once

#include "table.h"

struct Sgd {
    static const u32 SLOTS = 0;
    template <class Gradient> static const u32 BLOCKS = 4;
    METHOD void update(const Segment &s, float g, float &p, float &, float &) { p = sub(p, mul(s.rate, g)); }
};

struct Momentum {
    static const u32 SLOTS = 1;
    template <class Gradient> static const u32 BLOCKS = Gradient::SIZE == 4 ? 3 : 4;
    METHOD void update(const Segment &s, float g, float &p, float &a, float &) {
        a = add(mul(s.momentum, a), g);
        p = sub(p, mul(s.rate, a));
    }
};

struct Nesterov {
    static const u32 SLOTS = 1;
    template <class Gradient> static const u32 BLOCKS = Gradient::SIZE == 4 ? 3 : 4;
    METHOD void update(const Segment &s, float g, float &p, float &a, float &) {
        a = add(mul(s.momentum, a), g);
        p = sub(p, mul(s.rate, add(g, mul(s.momentum, a))));
    }
};

// Adam and AdamW: they differ in `decay` and `shrink`.
struct Adam {
    static const u32 SLOTS = 2;
    template <class Gradient> static const u32 BLOCKS = 2;
    METHOD void update(const Segment &s, float g, float &p, float &a, float &b) {
        a = add(mul(s.beta1, a), mul(s.alpha1, g));
        b = add(mul(s.beta2, b), mul(mul(s.alpha2, g), g));
        float denominator = add(mul(root(b), s.root_scale), s.epsilon);
        p = sub(mul(s.shrink, p), div(mul(s.step_size, a), denominator));
    }
};

struct Adagrad {
    static const u32 SLOTS = 1;
    template <class Gradient> static const u32 BLOCKS = 4;
    METHOD void update(const Segment &s, float g, float &p, float &a, float &) {
        a = add(a, mul(g, g));
        p = sub(p, div(mul(s.rate, g), add(root(a), s.epsilon)));
    }
};
