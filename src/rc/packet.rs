//! Packets to bytes and back: a base header, what the opcode adds, the payload, and a check at the end.
//!
//! The fields are those of the base transport header, the RDMA extended header and the acknowledge header (IBA 9.2, 9.3), with
//! the opcode values of the reliable-connected service (9.2.1); connection management takes values of the range that is left to
//! manufacturers. Integers are little-endian like everywhere in this house (IBA: big-endian). An immediate has 48 bytes, not 4:
//! it is the note itself and not the index of one. The check is a CRC-32C that starts from the secret of the queue pair that the
//! packet is sent to. It keeps damage, strangers and packets of an older connection out, as far as 32 bits go. It is NOT
//! cryptography: whoever can read packets can forge them.
//!
//! Invariant: what decodes encodes to the same bytes; decoding never panics and never allocates.

use super::{Psn, Syndrome};

/// Bytes of an immediate: a note.
pub const IMMEDIATE_BYTES: usize = 48;

/// What a message says to the receiver's program.
pub type Immediate = [u8; IMMEDIATE_BYTES];

/// Bytes that the largest packet has besides its payload.
pub const HEADER_BYTES_MAX: usize = BASE + EXTENDED + IMMEDIATE_BYTES + CHECK;

const BASE: usize = 12;
const EXTENDED: usize = 16;
const ACKNOWLEDGE: usize = 4;
const CHECK: usize = 4;
const VERSION: u16 = 1;
const FLAG_ACK_REQUEST: u8 = 1;

/// What a packet's check starts from: known to the two ends of a connection, fresh for each.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret(pub [u8; 16]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    fn check(&self, bytes: &[u8]) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&self.0), bytes)
    }
}

/// Where a write goes (the RDMA extended header, IBA 9.3.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The receiver's key of the region.
    pub rkey: u32,
    /// Of the first byte in the region.
    pub offset: u64,
    /// Bytes of the whole message.
    pub length: u32,
}

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// An immediate without payload.
    Send(Immediate),
    /// The first of several packets of a write.
    WriteFirst(Target),
    /// One between the first and the last.
    WriteMiddle,
    /// The last of several.
    WriteLast(Immediate),
    /// A write that fits into one packet.
    WriteOnly(Target, Immediate),
    /// A write of no bytes, for which no key is looked at (IBA 9.7.2): only its acknowledgement matters.
    Probe,
    /// The answer to requests.
    Acknowledge(Syndrome),
    /// "I am ready to receive from you": the sender waits for an answer.
    Hello,
    /// The answer to a hello.
    Ready,
    /// "Nothing more comes from me, and nothing more is taken."
    Bye,
}

impl Body {
    const fn opcode(&self) -> u8 {
        match self {
            Body::Send(_) => 0x04,
            Body::WriteFirst(_) => 0x06,
            Body::WriteMiddle => 0x07,
            Body::WriteLast(_) => 0x09,
            Body::Probe => 0x0a,
            Body::WriteOnly(..) => 0x0b,
            Body::Acknowledge(_) => 0x11,
            Body::Hello => 0xc0,
            Body::Ready => 0xc1,
            Body::Bye => 0xc2,
        }
    }

    /// Whether it is part of a message, has a place in the sequence, and is acknowledged.
    pub(super) const fn is_request(&self) -> bool {
        !matches!(self, Body::Acknowledge(_) | Body::Hello | Body::Ready | Body::Bye)
    }
}

/// A packet without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The queue pair that it is for, below 2^24.
    pub qpn: u32,
    /// Its place in the sequence; of an acknowledgement, the place that it is about.
    pub psn: Psn,
    /// Whether the sender wants to be answered now.
    pub ack_request: bool,
    /// What it is.
    pub body: Body,
}

/// Why bytes are no packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// Too few bytes for what it says it is, or too many.
    #[error("{0} bytes do not make a packet of its kind")]
    Length(usize),
    /// Damaged, or sealed with another secret.
    #[error("the check does not match")]
    Check,
    /// A field holds what nothing is assigned to.
    #[error("{field} has the unassigned value {value}")]
    Unassigned {
        /// Which field.
        field: &'static str,
        /// What it held.
        value: u32,
    },
}

impl Packet {
    /// The packet's bytes, with those of its payload and sealed under the receiver's secret; `bytes` is overwritten.
    pub fn encode(&self, payload: &[u8], secret: &Secret, bytes: &mut Vec<u8>) {
        bytes.clear();
        bytes.extend([self.body.opcode(), if self.ack_request { FLAG_ACK_REQUEST } else { 0 }]);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.qpn.to_le_bytes());
        bytes.extend(self.psn.bits().to_le_bytes());
        let zero = Target { rkey: 0, offset: 0, length: 0 };
        if let Body::WriteFirst(target) | Body::WriteOnly(target, _) = self.body {
            target.encode(bytes);
        } else if let Body::Probe = self.body {
            zero.encode(bytes);
        }
        match &self.body {
            Body::Send(immediate) | Body::WriteLast(immediate) | Body::WriteOnly(_, immediate) => {
                bytes.extend(immediate);
            }
            Body::Acknowledge(syndrome) => bytes.extend([syndrome.encode(), 0, 0, 0]),
            _ => {}
        }
        bytes.extend(payload);
        let check = secret.check(bytes);
        bytes.extend(check.to_le_bytes());
    }

    /// Which queue pair these bytes say they are for, before anything of them is believed.
    pub fn destination(bytes: &[u8]) -> Option<u32> {
        bytes.get(4..8).map(u32_of)
    }

    /// Reads a packet and its payload.
    pub fn decode<'a>(bytes: &'a [u8], secret: &Secret) -> Result<(Packet, &'a [u8]), PacketError> {
        let length = PacketError::Length(bytes.len());
        let (sealed, check) = bytes.split_last_chunk::<CHECK>().ok_or(length)?;
        if sealed.len() < BASE {
            return Err(length);
        }
        if secret.check(sealed) != u32::from_le_bytes(*check) {
            return Err(PacketError::Check);
        }
        let (base, mut rest) = sealed.split_at(BASE);
        let assigned = |field, value: u32, limit| {
            if value > limit { Err(PacketError::Unassigned { field, value }) } else { Ok(value) }
        };
        let version = u16::from_le_bytes([base[2], base[3]]);
        if version != VERSION {
            return Err(PacketError::Unassigned { field: "version", value: version.into() });
        }
        assigned("flags", base[1].into(), FLAG_ACK_REQUEST.into())?;
        let qpn = assigned("qpn", u32_of(&base[4..8]), Psn::MASK)?;
        let psn = Psn::new(assigned("psn", u32_of(&base[8..12]), Psn::MASK)?);
        let body = decode_body(base[0], &mut rest, length)?;
        let ack_request = base[1] == FLAG_ACK_REQUEST;
        if ack_request && !body.is_request() {
            return Err(PacketError::Unassigned { field: "flags", value: base[1].into() });
        }
        let fits = match &body {
            Body::WriteFirst(target) => !rest.is_empty() && rest.len() < target.length as usize,
            Body::WriteOnly(target, _) => rest.len() == target.length as usize,
            Body::WriteMiddle | Body::WriteLast(_) => !rest.is_empty(),
            _ => rest.is_empty(),
        };
        if fits { Ok((Packet { qpn, psn, ack_request, body }, rest)) } else { Err(length) }
    }
}

impl Target {
    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.offset.to_le_bytes());
        bytes.extend(self.rkey.to_le_bytes());
        bytes.extend(self.length.to_le_bytes());
    }
}

/// Reads what the opcode adds to the base header, and moves `rest` behind it.
fn decode_body(opcode: u8, rest: &mut &[u8], length: PacketError) -> Result<Body, PacketError> {
    let body = match opcode {
        0x04 => Body::Send(immediate(rest).ok_or(length)?),
        0x06 => Body::WriteFirst(target(rest).ok_or(length)?),
        0x07 => Body::WriteMiddle,
        0x09 => Body::WriteLast(immediate(rest).ok_or(length)?),
        0x0a => match target(rest).ok_or(length)? {
            Target { rkey: 0, offset: 0, length: 0 } => Body::Probe,
            Target { length, .. } => {
                return Err(PacketError::Unassigned { field: "target of a probe", value: length });
            }
        },
        0x0b => {
            let target = target(rest).ok_or(length)?;
            Body::WriteOnly(target, immediate(rest).ok_or(length)?)
        }
        0x11 => {
            let bytes = take::<ACKNOWLEDGE>(rest).ok_or(length)?;
            let value = u32::from_le_bytes(bytes);
            let syndrome = if value > 0xff { None } else { Syndrome::decode(bytes[0]) };
            Body::Acknowledge(syndrome.ok_or(PacketError::Unassigned { field: "syndrome", value })?)
        }
        0xc0 => Body::Hello,
        0xc1 => Body::Ready,
        0xc2 => Body::Bye,
        other => return Err(PacketError::Unassigned { field: "opcode", value: other.into() }),
    };
    Ok(body)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (first, behind) = rest.split_first_chunk::<N>()?;
    *rest = behind;
    Some(*first)
}

fn immediate(rest: &mut &[u8]) -> Option<Immediate> {
    take(rest)
}

fn target(rest: &mut &[u8]) -> Option<Target> {
    let bytes = take::<EXTENDED>(rest)?;
    let (offset, keys) = bytes.split_first_chunk::<8>()?;
    let offset = u64::from_le_bytes(*offset);
    Some(Target { offset, rkey: u32_of(&keys[..4]), length: u32_of(&keys[4..]) })
}

/// Reads a little-endian u32 from exactly four bytes.
fn u32_of(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, byte| (value << 8) | u32::from(*byte))
}
