//! From libhwloc's tree of objects to our plain lists.
//!
//! Invariant: no pointer of libhwloc leaves this file; a loaded topology is destroyed once read.

use std::ffi::{CStr, CString, c_char, c_int};

use super::{Core, Device, DeviceKind, Node, Source, Topology};
use crate::sys::hwloc::{self, HwlocBitmap, HwlocObj, HwlocPci, HwlocTopology, Table};

/// What to read.
pub(super) enum Input<'a> {
    /// The machine that we run on.
    ThisMachine,
    /// A description in words.
    Synthetic(&'a str),
    /// A description in XML.
    Xml(&'a str),
}

/// Parts of libhwloc that ask vendors' libraries: slow (CUDA starts up), and what they know (names like `cuda0`) depends on the
/// environment. PCI tells us where the GPUs are.
const LEFT_OUT: [&CStr; 6] = [c"cuda", c"nvml", c"opencl", c"rsmi", c"levelzero", c"gl"];

/// PCI class "display controller, VGA": a GPU, or the screen of a server's management processor.
const PCI_CLASS_VGA: u16 = 0x0300;
/// PCI classes that only accelerators have: 3D controller, other display controller, processing accelerator.
const PCI_CLASSES_ACCELERATOR: [u16; 3] = [0x0302, 0x0380, 0x1200];
/// NVIDIA and AMD, whose VGA devices compute.
const PCI_VENDORS_GPU: [u16; 2] = [0x10de, 0x1002];

/// Reads a machine; in words why not.
pub(super) fn load(table: &Table, input: Input<'_>) -> Result<Topology, String> {
    let source = if matches!(input, Input::ThisMachine) { Source::Hwloc } else { Source::Description };
    let tree = Tree::load(table, input)?;
    let mut topology = Topology { cores: tree.cores(), nodes: tree.nodes(), devices: tree.devices(), source };
    topology.cores.sort_by_key(|core| (core.physical, core.os_index));
    topology.nodes.sort_by_key(|node| node.os_index);
    topology.devices.sort_by(|a, b| (&a.pci, a.kind, &a.name).cmp(&(&b.pci, b.kind, &b.name)));
    Ok(topology)
}

/// A loaded topology. Objects are reached through it only, so none outlives it.
struct Tree<'a> {
    table: &'a Table,
    topology: *mut HwlocTopology,
}

impl Drop for Tree<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `topology_init` in `load`, destroyed only here; objects are borrowed from self, so none is left.
        unsafe { (self.table.topology_destroy)(self.topology) };
    }
}

impl<'a> Tree<'a> {
    fn load(table: &'a Table, input: Input<'_>) -> Result<Tree<'a>, String> {
        let check = |call: &str, result: c_int| {
            let error = std::io::Error::last_os_error();
            if result == 0 { Ok(()) } else { Err(format!("{call} failed: {error}")) }
        };
        let mut topology = std::ptr::null_mut();
        // SAFETY: writes a new topology to the pointer given; on failure nothing is written and we leave.
        check("hwloc_topology_init", unsafe { (table.topology_init)(&mut topology) })?;
        let tree = Tree { table, topology };
        for part in LEFT_OUT {
            // SAFETY: a topology that is not loaded yet and a C string. A part that this libhwloc does not have is refused; that
            // is as good, so the result does not matter.
            let _ = unsafe { (table.topology_set_components)(topology, hwloc::COMPONENTS_BLACKLIST, part.as_ptr()) };
        }
        // SAFETY: a topology that is not loaded yet, and a filter that hwloc knows.
        let filtered = unsafe { (table.topology_set_io_types_filter)(topology, hwloc::FILTER_KEEP_IMPORTANT) };
        check("hwloc_topology_set_io_types_filter", filtered)?;
        let this_machine = matches!(input, Input::ThisMachine);
        match input {
            Input::ThisMachine => {}
            Input::Synthetic(text) => {
                let text = CString::new(text).map_err(|e| format!("the description holds a NUL: {e}"))?;
                // SAFETY: a topology that is not loaded yet and a C string, which hwloc reads within the call.
                let result = unsafe { (table.topology_set_synthetic)(topology, text.as_ptr()) };
                check("hwloc_topology_set_synthetic", result)
                    .map_err(|e| format!("{e} (is `{}` a machine?)", text.to_string_lossy()))?;
            }
            Input::Xml(text) => {
                let text = CString::new(text).map_err(|e| format!("the XML holds a NUL: {e}"))?;
                let len = c_int::try_from(text.as_bytes_with_nul().len()).map_err(|_| "the XML is beyond 2 GiB")?;
                // SAFETY: a topology that is not loaded yet and a buffer of `len` bytes, which hwloc copies or parses within the
                // call.
                let result = unsafe { (table.topology_set_xmlbuffer)(topology, text.as_ptr(), len) };
                check("hwloc_topology_set_xmlbuffer", result).map_err(|e| format!("{e} (is this hwloc's XML?)"))?;
            }
        }
        // SAFETY: a topology that was configured and not loaded yet.
        check("hwloc_topology_load", unsafe { (table.topology_load)(topology) })?;
        // SAFETY: a loaded topology.
        if this_machine && unsafe { (table.topology_is_thissystem)(topology) } == 0 {
            return Err("HWLOC_XMLFILE or HWLOC_SYNTHETIC tells hwloc of another machine".to_owned());
        }
        Ok(tree)
    }

    /// The objects of a level.
    fn level(&self, depth: c_int) -> impl Iterator<Item = &HwlocObj> {
        // SAFETY: a loaded topology; any depth may be asked for.
        let count = unsafe { (self.table.get_nbobjs_by_depth)(self.topology, depth) };
        (0..count).filter_map(move |index| {
            // SAFETY: as above; the object, if there is one, lives and does not change until the topology is destroyed, and
            // the reference borrows self.
            unsafe { (self.table.get_obj_by_depth)(self.topology, depth, index).as_ref() }
        })
    }

    /// The object and what it is in, outwards.
    fn outwards<'b>(&'b self, object: &'b HwlocObj) -> impl Iterator<Item = &'b HwlocObj> {
        // SAFETY: parents are objects of the same topology or null (the invariant of libhwloc's tree); they live as long as self.
        std::iter::successors(Some(object), |object| unsafe { object.parent.as_ref() })
    }

    fn cores(&self) -> Vec<Core> {
        // SAFETY: a loaded topology; PUs always have a level.
        let depth = unsafe { (self.table.get_type_depth)(self.topology, hwloc::OBJ_PU) };
        let core = |unit: &HwlocObj| Core {
            os_index: unit.os_index as usize,
            // A virtual machine may show no cores, then each unit is one; the numbers of units and cores are not comparable,
            // but a machine has cores for all or for none.
            physical: self
                .outwards(unit)
                .find(|object| object.kind == hwloc::OBJ_CORE)
                .map_or(unit.logical_index, |core| core.logical_index) as usize,
            node: self.bits(unit.nodeset).next(),
        };
        self.level(depth).map(core).collect()
    }

    fn nodes(&self) -> Vec<Node> {
        let node = |object: &HwlocObj| {
            // SAFETY: null or the attributes of a NUMA node, which begin with its memory (sys::hwloc).
            let memory_bytes = unsafe { object.attr.as_ref().map_or(0, |attributes| attributes.local_memory) };
            Node { os_index: object.os_index, memory_bytes }
        };
        self.level(hwloc::DEPTH_NUMANODE).map(node).collect()
    }

    fn devices(&self) -> Vec<Device> {
        let mut devices = Vec::new();
        for object in self.level(hwloc::DEPTH_OS_DEVICE) {
            let kind = match osdev_kind(object) {
                hwloc::OSDEV_NETWORK => DeviceKind::Nic,
                hwloc::OSDEV_OPENFABRICS => DeviceKind::Rdma,
                _ => continue,
            };
            let pci = self.outwards(object).find_map(pci_attributes).map(|pci| pci_address(&pci));
            devices.push(Device { name: text(object.name).unwrap_or_default(), kind, node: self.node_of(object), pci });
        }
        for object in self.level(hwloc::DEPTH_PCI_DEVICE) {
            let Some(pci) = pci_attributes(object).filter(is_gpu) else { continue };
            let address = pci_address(&pci);
            let name = self.gpu_name(object).unwrap_or_else(|| address.clone());
            devices.push(Device { name, kind: DeviceKind::Gpu, node: self.node_of(object), pci: Some(address) });
        }
        devices
    }

    /// What software calls the GPU at this PCI object: the computing library's name before the display's.
    fn gpu_name(&self, pci: &HwlocObj) -> Option<String> {
        let named = |kind| {
            self.level(hwloc::DEPTH_OS_DEVICE)
                .find(|object| std::ptr::eq(object.parent, pci) && osdev_kind(object) == kind)
                .and_then(|object| text(object.name))
        };
        named(hwloc::OSDEV_COPROC).or_else(|| named(hwloc::OSDEV_GPU))
    }

    /// The node of the innermost part of the machine that a device hangs off. If that is the whole machine and it has several
    /// nodes, the firmware does not say where the device is, and nor do we.
    fn node_of(&self, device: &HwlocObj) -> Option<u32> {
        let place = self.outwards(device).find(|object| !object.cpuset.is_null())?;
        let mut nodes = self.bits(place.nodeset);
        let first = nodes.next();
        if place.kind == hwloc::OBJ_MACHINE && nodes.next().is_some() { None } else { first }
    }

    /// The bits of a set, ascending; none of a null one.
    fn bits(&self, bitmap: *const HwlocBitmap) -> impl Iterator<Item = u32> {
        let next = self.table.bitmap_next;
        let mut previous = -1;
        std::iter::from_fn(move || {
            if bitmap.is_null() {
                return None;
            }
            // SAFETY: a set of an object of this topology; the iterator borrows self, so it is still there.
            previous = unsafe { next(bitmap, previous) };
            u32::try_from(previous).ok()
        })
    }
}

fn osdev_kind(object: &HwlocObj) -> c_int {
    // SAFETY: only called on OS devices, whose attributes (or null) are their type.
    unsafe { object.attr.as_ref().map_or(-1, |attributes| attributes.osdev) }
}

fn pci_attributes(object: &HwlocObj) -> Option<HwlocPci> {
    if object.kind != hwloc::OBJ_PCI_DEVICE {
        return None;
    }
    // SAFETY: the attributes of a PCI device are null or begin with what `HwlocPci` declares.
    unsafe { object.attr.as_ref().map(|attributes| attributes.pci) }
}

fn is_gpu(pci: &HwlocPci) -> bool {
    PCI_CLASSES_ACCELERATOR.contains(&pci.class_id)
        || (pci.class_id == PCI_CLASS_VGA && PCI_VENDORS_GPU.contains(&pci.vendor_id))
}

fn pci_address(pci: &HwlocPci) -> String {
    format!("{:04x}:{:02x}:{:02x}.{:x}", pci.domain, pci.bus, pci.dev, pci.func)
}

fn text(string: *const c_char) -> Option<String> {
    if string.is_null() {
        return None;
    }
    // SAFETY: a name of a live object: NUL-terminated, and copied before anything else happens.
    Some(unsafe { CStr::from_ptr(string) }.to_string_lossy().into_owned())
}
