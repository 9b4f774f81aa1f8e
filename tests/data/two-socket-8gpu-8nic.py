"""Writes two-socket-8gpu-8nic.xml, the machine that placement is tested on, in hwloc 2's XML.

Two sockets, each a NUMA node of 512 GiB with 32 cores of two threads (numbered as Linux does: all first threads, then all
second ones), and behind each socket four PCI switches, each with one H100-like GPU and one 400 Gb/s NIC (a network interface
and an RDMA device). The management processor's screen and an onboard NIC hang off socket 0.

Run: python3 two-socket-8gpu-8nic.py > two-socket-8gpu-8nic.xml
"""

SOCKETS, CORES, SWITCHES = 2, 32, 4
THREADS = SOCKETS * CORES
numbers = iter(range(1, 10**6))


def mask(bits):
    """hwloc's notation: 32-bit words, the highest first."""
    value, words = sum(1 << bit for bit in bits), []
    while value or not words:
        words.insert(0, f"0x{value & 0xFFFFFFFF:08x}")
        value >>= 32
    return ",".join(words)


def place(cpus, nodes):
    c, n = mask(cpus), mask(nodes)
    return f'cpuset="{c}" complete_cpuset="{c}" nodeset="{n}" complete_nodeset="{n}" gp_index="{next(numbers)}"'


def pci(address, kind, link, devices):
    print(f'<object type="PCIDev" gp_index="{next(numbers)}" pci_busid="{address}" pci_type="{kind}" pci_link_speed="{link}">')
    for name, osdev in devices:
        print(f'<object type="OSDev" gp_index="{next(numbers)}" name="{name}" osdev_type="{osdev}"/>')
    print("</object>")


def bridge(kind, depth, bus, first, last):
    at = f'pci_busid="{bus}" pci_type="0604 [1000:c030] [0000:0000] b0" pci_link_speed="63.0" ' if kind == "1-1" else ""
    print(f'<object type="Bridge" gp_index="{next(numbers)}" bridge_type="{kind}" depth="{depth}" '
          f'bridge_pci="0000:[{first:02x}-{last:02x}]" {at}>')


def socket(index):
    cores = range(index * CORES, (index + 1) * CORES)
    cpus = [core + thread * THREADS for core in cores for thread in (0, 1)]
    print(f'<object type="Package" os_index="{index}" {place(cpus, [index])}>')
    print(f'<object type="NUMANode" os_index="{index}" {place(cpus, [index])} local_memory="{512 << 30}"/>')
    for core in cores:
        print(f'<object type="Core" os_index="{core % CORES}" {place([core, core + THREADS], [index])}>')
        for unit in (core, core + THREADS):
            print(f'<object type="PU" os_index="{unit}" {place([unit], [index])}/>')
        print("</object>")
    for switch in range(SWITCHES):
        number, bus = index * SWITCHES + switch, 0x10 + 0x80 * index + 0x10 * switch
        bridge("0-1", 0, None, bus, bus + 3)
        bridge("1-1", 1, f"0000:{bus:02x}:01.0", bus + 1, bus + 3)
        pci(f"0000:{bus + 2:02x}:00.0", "0302 [10de:2330] [10de:16c1] a1", "63.0", [])
        pci(f"0000:{bus + 3:02x}:00.0", "0200 [15b3:1021] [15b3:0041] 00", "63.0",
            [(f"ibs{number}", 2), (f"mlx5_{number}", 3)])
        print("</object></object>")
    if index == 0:
        bridge("0-1", 0, None, 0, 2)
        pci("0000:01:00.0", "0200 [8086:1563] [8086:0000] 01", "1.0", [("eno1", 2)])
        pci("0000:02:00.0", "0300 [1a03:2000] [1a03:2000] 52", "0.0", [("card0", 1)])
        print("</object>")
    print("</object>")


everything, nodes = range(2 * THREADS), range(SOCKETS)
print('<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE topology SYSTEM "hwloc2.dtd">\n<topology version="2.0">')
print(f'<object type="Machine" os_index="0" allowed_cpuset="{mask(everything)}" allowed_nodeset="{mask(nodes)}" '
      f"{place(everything, nodes)}>")
for index in nodes:
    socket(index)
print("</object>\n</topology>")
