//! Finding the library, and what of its structures is declared by hand against the header.
//!
//! Invariant: no test needs libibverbs.

use std::mem::{offset_of, size_of};

use super::*;
use crate::sys::header;

#[test]
fn a_library_that_is_not_there_or_is_another_is_told_by_name() {
    let error = Table::open("libibverbs-of-nowhere.so.1").err().unwrap();
    assert!(error.contains("libibverbs-of-nowhere.so.1 cannot be loaded") && error.contains("No such file"), "{error}");
    let error = Table::open("libc.so.6").err().unwrap();
    assert!(error.contains("libc.so.6 is not of rdma-core") && error.contains("ibv_get_device_list"), "{error}");
}

/// Places in `struct verbs_context`, counted back from the context at its end.
fn extension() -> Vec<(&'static str, i64)> {
    macro_rules! before {
        ($($field:ident $c_field:literal),*) => {
            vec![$((
                concat!("offsetof(struct verbs_context, context) - offsetof(struct verbs_context, ", $c_field, ")"),
                (size_of::<VerbsExtension>() - offset_of!(VerbsExtension, $field)) as i64,
            )),*]
        };
    }
    let mut beliefs = before!(
        alloc_parent_domain "alloc_parent_domain", dealloc_td "dealloc_td", alloc_td "alloc_td", others "modify_cq", size "sz");
    beliefs.push(("__VERBS_ABI_IS_EXTENDED == (void *)-1", 1));
    beliefs.push(("offsetof(struct ibv_parent_domain_init_attr, td)", offset_of!(IbvParentDomainInitAttr, td) as i64));
    for (expression, size) in [
        ("sizeof(struct ibv_context)", size_of::<IbvContext>()),
        ("sizeof(struct ibv_td_init_attr)", size_of::<IbvTdInitAttr>()),
        ("sizeof(struct ibv_parent_domain_init_attr)", size_of::<IbvParentDomainInitAttr>()),
    ] {
        beliefs.push((expression, size as i64));
    }
    let mask = offset_of!(IbvParentDomainInitAttr, comp_mask) as i64;
    beliefs.push(("offsetof(struct ibv_parent_domain_init_attr, comp_mask)", mask));
    beliefs
}

/// C's types of its functions.
const FUNCTIONS: &[(&str, &str)] = &[
    ("alloc_parent_domain", "struct ibv_pd *(**)(struct ibv_context *, struct ibv_parent_domain_init_attr *)"),
    ("dealloc_td", "int (**)(struct ibv_td *)"),
    ("alloc_td", "struct ibv_td *(**)(struct ibv_context *, struct ibv_td_init_attr *)"),
];

#[test]
fn what_lies_before_a_context_is_as_in_the_header() {
    let declaration = |(function, c_type): &(&str, &str)| {
        let member = format!("__typeof__(&((struct verbs_context *)0)->{function})");
        format!("_Static_assert(__builtin_types_compatible_p({member}, {c_type}), \"{function}\");\n")
    };
    let declarations: String = FUNCTIONS.iter().map(declaration).collect();
    header::compare(&declarations, "infiniband/verbs.h", "libibverbs-dev", &extension());
}
