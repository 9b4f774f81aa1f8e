//! The functions of libhwloc 2.x that we call, found at run time, and the parts of its structures that we read.
//!
//! Why not the `hwlocality` crate: docs/decisions/0001-hwloc-by-dlopen.md.
//!
//! Invariant: types and numbers here are those of <hwloc.h> for every libhwloc.so.15 (the soname stands for one binary
//! interface, hwloc 2.0 and later); `tests` compares them with the header where there is one.

use std::{
    error::Error as _,
    ffi::{c_char, c_int, c_uint, c_ulong, c_ushort},
    sync::OnceLock,
};

use libloading::Library;

/// The name under which distributions install hwloc 2.x.
pub const SONAME: &str = "libhwloc.so.15";

/// `struct hwloc_topology`, opaque.
#[repr(C)]
pub struct HwlocTopology {
    _opaque: [u8; 0],
}

/// `struct hwloc_bitmap_s`, opaque.
#[repr(C)]
pub struct HwlocBitmap {
    _opaque: [u8; 0],
}

/// `struct hwloc_obj`, up to its node set; what follows is never read.
#[repr(C)]
pub struct HwlocObj {
    /// One of `OBJ_*`.
    pub kind: c_int,
    /// Null or a string.
    pub subtype: *const c_char,
    /// The operating system's number; `UNKNOWN_INDEX` if it has none.
    pub os_index: c_uint,
    /// Null or a string; of OS devices, their name.
    pub name: *const c_char,
    /// Bytes of memory in NUMA nodes below.
    pub total_memory: u64,
    /// Null or attributes by `kind`.
    pub attr: *const HwlocAttributes,
    /// Level in the tree; negative for I/O and memory objects.
    pub depth: c_int,
    /// Number within its level.
    pub logical_index: c_uint,
    /// Next object of the level.
    pub next_cousin: *const HwlocObj,
    /// Previous object of the level.
    pub prev_cousin: *const HwlocObj,
    /// Null for the machine.
    pub parent: *const HwlocObj,
    /// Number among its siblings.
    pub sibling_rank: c_uint,
    /// Next sibling.
    pub next_sibling: *const HwlocObj,
    /// Previous sibling.
    pub prev_sibling: *const HwlocObj,
    /// Number of normal children.
    pub arity: c_uint,
    /// Normal children.
    pub children: *const *const HwlocObj,
    /// First of them.
    pub first_child: *const HwlocObj,
    /// Last of them.
    pub last_child: *const HwlocObj,
    /// Whether all subtrees are alike.
    pub symmetric_subtree: c_int,
    /// Number of memory children.
    pub memory_arity: c_uint,
    /// First of them.
    pub memory_first_child: *const HwlocObj,
    /// Number of I/O children.
    pub io_arity: c_uint,
    /// First of them.
    pub io_first_child: *const HwlocObj,
    /// Number of other children.
    pub misc_arity: c_uint,
    /// First of them.
    pub misc_first_child: *const HwlocObj,
    /// Null for I/O objects.
    pub cpuset: *const HwlocBitmap,
    /// Null for I/O objects.
    pub complete_cpuset: *const HwlocBitmap,
    /// NUMA nodes near the object; null for I/O objects.
    pub nodeset: *const HwlocBitmap,
}

/// `union hwloc_obj_attr_u`: which member is valid, `HwlocObj::kind` says.
#[repr(C)]
pub union HwlocAttributes {
    /// Of a NUMA node: its bytes of memory (the first field of `struct hwloc_numanode_attr_s`).
    pub local_memory: u64,
    /// Of a PCI device.
    pub pci: HwlocPci,
    /// Of an OS device: one of `OSDEV_*`.
    pub osdev: c_int,
}

/// `struct hwloc_pcidev_attr_s`, up to the device's maker.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct HwlocPci {
    /// PCI domain.
    pub domain: c_ushort,
    /// Bus.
    pub bus: u8,
    /// Slot.
    pub dev: u8,
    /// Function.
    pub func: u8,
    /// Class and subclass, as in the PCI ID repository.
    pub class_id: c_ushort,
    /// The maker.
    pub vendor_id: c_ushort,
}

/// `HWLOC_OBJ_MACHINE`.
pub const OBJ_MACHINE: c_int = 0;
/// `HWLOC_OBJ_CORE`.
pub const OBJ_CORE: c_int = 2;
/// `HWLOC_OBJ_PU`: what the operating system calls a CPU.
pub const OBJ_PU: c_int = 3;
/// `HWLOC_OBJ_PCI_DEVICE`.
pub const OBJ_PCI_DEVICE: c_int = 15;
/// `HWLOC_OBJ_OSDEV_GPU`: a display, or what a GPU library calls a GPU.
pub const OSDEV_GPU: c_int = 1;
/// `HWLOC_OBJ_OSDEV_NETWORK`.
pub const OSDEV_NETWORK: c_int = 2;
/// `HWLOC_OBJ_OSDEV_OPENFABRICS`: an RDMA device.
pub const OSDEV_OPENFABRICS: c_int = 3;
/// `HWLOC_OBJ_OSDEV_COPROC`: what a computing library calls a device.
pub const OSDEV_COPROC: c_int = 5;
/// `HWLOC_TYPE_DEPTH_NUMANODE`.
pub const DEPTH_NUMANODE: c_int = -3;
/// `HWLOC_TYPE_DEPTH_PCI_DEVICE`.
pub const DEPTH_PCI_DEVICE: c_int = -5;
/// `HWLOC_TYPE_DEPTH_OS_DEVICE`.
pub const DEPTH_OS_DEVICE: c_int = -6;
/// `HWLOC_TYPE_FILTER_KEEP_IMPORTANT`: of I/O, what is neither a bridge to nothing nor a device of no use.
pub const FILTER_KEEP_IMPORTANT: c_int = 3;
/// `HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST`.
pub const COMPONENTS_BLACKLIST: c_ulong = 1;
/// `HWLOC_UNKNOWN_INDEX`.
#[cfg(test)]
pub const UNKNOWN_INDEX: c_uint = c_uint::MAX;

/// Declares the table: a field per function, named as in C without its prefix, and the lookup of all of them.
macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// libhwloc's functions.
        pub struct Table {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            /// Keeps the code mapped.
            _library: Library,
        }

        impl Table {
            fn look_up(library: Library) -> Result<Table, String> {
                $(
                    // SAFETY: the type is that of the symbol in <hwloc.h>, the same in every library of this soname
                    // (invariant of this file); the pointer is kept beside the library, so it never dangles.
                    let $name = unsafe {
                        *library.get::<unsafe extern "C" fn($($argument),*) $(-> $result)?>($symbol)
                            .map_err(|error| format!("{:?} is missing: {}", $symbol, reason(&error)))?
                    };
                )*
                Ok(Table { $($name,)* _library: library })
            }
        }
    };
}

table! {
    /// Version of the interface, `0x00MMmmpp`.
    get_api_version = c"hwloc_get_api_version": fn() -> c_uint;
    /// Makes an empty topology. 0 or -1.
    topology_init = c"hwloc_topology_init": fn(*mut *mut HwlocTopology) -> c_int;
    /// Ends a topology.
    topology_destroy = c"hwloc_topology_destroy": fn(*mut HwlocTopology);
    /// Before load: a machine described in words. 0 or -1.
    topology_set_synthetic = c"hwloc_topology_set_synthetic": fn(*mut HwlocTopology, *const c_char) -> c_int;
    /// Before load: a machine described in XML (length with its NUL). 0 or -1.
    topology_set_xmlbuffer = c"hwloc_topology_set_xmlbuffer": fn(*mut HwlocTopology, *const c_char, c_int) -> c_int;
    /// Before load: which I/O objects to keep. 0 or -1.
    topology_set_io_types_filter = c"hwloc_topology_set_io_types_filter": fn(*mut HwlocTopology, c_int) -> c_int;
    /// Before load: leaves a component of libhwloc out (hwloc 2.1). 0 or -1.
    topology_set_components = c"hwloc_topology_set_components": fn(*mut HwlocTopology, c_ulong, *const c_char) -> c_int;
    /// Discovers. 0 or -1.
    topology_load = c"hwloc_topology_load": fn(*mut HwlocTopology) -> c_int;
    /// Whether the topology is of the machine that we run on.
    topology_is_thissystem = c"hwloc_topology_is_thissystem": fn(*mut HwlocTopology) -> c_int;
    /// The level of a type of object; negative if none or special.
    get_type_depth = c"hwloc_get_type_depth": fn(*mut HwlocTopology, c_int) -> c_int;
    /// Number of objects of a level.
    get_nbobjs_by_depth = c"hwloc_get_nbobjs_by_depth": fn(*mut HwlocTopology, c_int) -> c_uint;
    /// An object of a level; null beyond the last.
    get_obj_by_depth = c"hwloc_get_obj_by_depth": fn(*mut HwlocTopology, c_int, c_uint) -> *const HwlocObj;
    /// The first bit set after one (-1: at all); -1 if none.
    bitmap_next = c"hwloc_bitmap_next": fn(*const HwlocBitmap, c_int) -> c_int;
}

impl Table {
    /// Loads the library of that name, or says in words why not.
    pub fn open(name: &str) -> Result<Table, String> {
        // SAFETY: loading runs the library's initialisers. Under the name given that is the distribution's libhwloc, which is
        // trusted like every library that the dynamic linker would have loaded for us; it is never unloaded before exit by
        // `table`, and where a test drops it, no pointer of it is left.
        let library =
            unsafe { Library::new(name) }.map_err(|error| format!("{name} cannot be loaded: {}", reason(&error)))?;
        let table = Table::look_up(library).map_err(|error| format!("{name} is not hwloc 2.1 or later: {error}"))?;
        // SAFETY: takes nothing and reads a constant; the type is the header's.
        let version = unsafe { (table.get_api_version)() };
        // Other major versions have another `hwloc_obj`.
        if version >> 16 == 2 { Ok(table) } else { Err(format!("{name} has interface {version:#x}, not 2.x")) }
    }
}

/// What the dynamic linker said; the error itself says only which of its functions was called.
fn reason(error: &libloading::Error) -> String {
    error.source().unwrap_or(error).to_string()
}

/// libhwloc, loaded at the first call and for good; or why there is none, and what to install.
pub fn table() -> Result<&'static Table, &'static str> {
    static TABLE: OnceLock<Result<Table, String>> = OnceLock::new();
    let load = || {
        Table::open(SONAME)
            .map_err(|error| format!("{error} (`apt-get install libhwloc15` or `dnf install hwloc-libs`)"))
    };
    TABLE.get_or_init(load).as_ref().map_err(String::as_str)
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;
    use crate::sys::header;

    #[test]
    fn a_library_that_is_not_there_or_is_another_is_told_by_name() {
        let error = Table::open("libhwloc-of-nowhere.so.15").err().unwrap();
        assert!(
            error.contains("libhwloc-of-nowhere.so.15 cannot be loaded") && error.contains("No such file"),
            "{error}"
        );
        let error = Table::open("libc.so.6").err().unwrap();
        assert!(error.contains("libc.so.6 is not hwloc") && error.contains("hwloc_get_api_version"), "{error}");
    }

    /// Every offset and number of this file as C expressions, and what we believe them to be.
    fn beliefs() -> Vec<(&'static str, i64)> {
        macro_rules! offsets {
            ($type:ty, $c_type:literal: $($field:ident $c_field:literal),* $(,)?) => {
                vec![$((concat!("offsetof(", $c_type, ", ", $c_field, ")"), offset_of!($type, $field) as i64)),*]
            };
        }
        let mut beliefs = offsets!(HwlocObj, "struct hwloc_obj":
            kind "type", subtype "subtype", os_index "os_index", name "name", total_memory "total_memory", attr "attr",
            depth "depth", logical_index "logical_index", next_cousin "next_cousin", prev_cousin "prev_cousin",
            parent "parent", sibling_rank "sibling_rank", next_sibling "next_sibling", prev_sibling "prev_sibling",
            arity "arity", children "children", first_child "first_child", last_child "last_child",
            symmetric_subtree "symmetric_subtree", memory_arity "memory_arity", memory_first_child "memory_first_child",
            io_arity "io_arity", io_first_child "io_first_child", misc_arity "misc_arity",
            misc_first_child "misc_first_child", cpuset "cpuset", complete_cpuset "complete_cpuset", nodeset "nodeset");
        beliefs.extend(offsets!(HwlocPci, "struct hwloc_pcidev_attr_s":
            domain "domain", bus "bus", dev "dev", func "func", class_id "class_id", vendor_id "vendor_id"));
        beliefs.extend([
            ("sizeof(hwloc_obj_type_t)", size_of::<c_int>() as i64),
            ("sizeof(((struct hwloc_pcidev_attr_s*)0)->domain)", size_of::<c_ushort>() as i64),
            ("sizeof(((struct hwloc_osdev_attr_s*)0)->type)", size_of::<c_int>() as i64),
            ("offsetof(struct hwloc_numanode_attr_s, local_memory)", 0),
            ("sizeof(((struct hwloc_numanode_attr_s*)0)->local_memory)", size_of::<u64>() as i64),
            ("HWLOC_OBJ_MACHINE", OBJ_MACHINE.into()),
            ("HWLOC_OBJ_CORE", OBJ_CORE.into()),
            ("HWLOC_OBJ_PU", OBJ_PU.into()),
            ("HWLOC_OBJ_PCI_DEVICE", OBJ_PCI_DEVICE.into()),
            ("HWLOC_OBJ_OSDEV_GPU", OSDEV_GPU.into()),
            ("HWLOC_OBJ_OSDEV_NETWORK", OSDEV_NETWORK.into()),
            ("HWLOC_OBJ_OSDEV_OPENFABRICS", OSDEV_OPENFABRICS.into()),
            ("HWLOC_OBJ_OSDEV_COPROC", OSDEV_COPROC.into()),
            ("HWLOC_TYPE_DEPTH_NUMANODE", DEPTH_NUMANODE.into()),
            ("HWLOC_TYPE_DEPTH_PCI_DEVICE", DEPTH_PCI_DEVICE.into()),
            ("HWLOC_TYPE_DEPTH_OS_DEVICE", DEPTH_OS_DEVICE.into()),
            ("HWLOC_TYPE_FILTER_KEEP_IMPORTANT", FILTER_KEEP_IMPORTANT.into()),
            ("HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST", COMPONENTS_BLACKLIST as i64),
            ("HWLOC_UNKNOWN_INDEX", UNKNOWN_INDEX.into()),
            ("HWLOC_API_VERSION >> 16", 2),
        ]);
        beliefs
    }

    #[test]
    fn our_layout_is_that_of_the_header() {
        header::compare("", "hwloc.h", "libhwloc-dev", &beliefs());
    }
}
