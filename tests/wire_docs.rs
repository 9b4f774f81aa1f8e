//! docs/wire.md against the code: notes, frames, and what shared memory is made of.
//!
//! Invariant: the page is read as it is; no list of kinds is kept here.

use gradwire::{
    rc::{Body, Packet, Psn, Secret, Syndrome, Target},
    transport::shm::RING_LAYOUT,
    wire::{FrameHeader, Note, NoteKind, ShareMessage},
};

const PAGE: &str = include_str!("../docs/wire.md");

/// The cells of the rows of the table under a heading line.
fn rows(heading: &str) -> Vec<Vec<&'static str>> {
    let table = PAGE.lines().skip_while(|line| !line.starts_with(heading)).skip(2);
    let rows = table.take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

#[test]
fn the_table_of_kinds_is_the_code() {
    let mut documented = Vec::new();
    for row in rows("| kind | name |") {
        let value: u8 = row[0].parse().unwrap();
        let kind = NoteKind::try_from(value).unwrap_or_else(|error| panic!("kind {value} is documented: {error}"));
        assert_eq!(format!("{kind:?}"), row[1]);
        assert_eq!(kind.has_payload(), row[3] != "no", "{kind:?}");
        documented.push(value);
    }
    let known: Vec<u8> = (0..=u8::MAX).filter(|value| NoteKind::try_from(*value).is_ok()).collect();
    assert_eq!(documented, known);
}

/// A field of the note's table is where the encoder puts it: a field that is changed changes these bytes and the checksum.
#[test]
fn the_fields_of_a_note_are_where_the_page_says() {
    let zero = Note::new(NoteKind::Push);
    let changed = |change: &dyn Fn(&mut Note)| {
        let mut note = zero;
        change(&mut note);
        let (before, after) = (zero.encode(), note.encode());
        let bytes = (0..44).filter(|at| before[*at] != after[*at]);
        bytes.collect::<Vec<usize>>()
    };
    let all_ones: [(&str, Vec<usize>); 9] = [
        ("kind", changed(&|note| note.kind = NoteKind::Pull)),
        ("weight", changed(&|note| note.weight = u16::MAX)),
        ("chunk", changed(&|note| note.chunk.0 = u32::MAX)),
        ("clock", changed(&|note| note.clock = u64::MAX)),
        ("version", changed(&|note| note.version = u64::MAX)),
        ("epoch", changed(&|note| note.epoch = u32::MAX)),
        ("length", changed(&|note| note.length = u32::MAX)),
        ("credit", changed(&|note| note.credit = u64::MAX)),
        ("payload checksum", changed(&|note| note.payload_checksum = u32::MAX)),
    ];
    let table = rows("| offset | size | field |");
    let mut end = 0;
    for row in &table {
        let (offset, size): (usize, usize) = (row[0].parse().unwrap(), row[1].parse().unwrap());
        assert_eq!(offset, end, "a hole before {}", row[2]);
        end = offset + size;
        if let Some((_, bytes)) = all_ones.iter().find(|(field, _)| *field == row[2]) {
            assert_eq!(*bytes, (offset..end).collect::<Vec<_>>(), "{}", row[2]);
        } else {
            assert!(["flags", "checksum"].contains(&row[2]), "{} is not in the code", row[2]);
        }
    }
    assert_eq!((end, table.len()), (Note::SIZE, all_ones.len() + 2));
    assert!(PAGE.contains(&format!("## Note ({} bytes", Note::SIZE)));
    assert!(PAGE.contains(&format!("({} bytes, `wire/frame.rs`)", FrameHeader::SIZE)));
}

/// Every body that a packet can have, with the bytes of payload that make it a whole packet.
fn bodies() -> Vec<(Body, usize)> {
    let target = Target { rkey: 1, offset: 2, length: 3 };
    vec![
        (Body::Send([0; 48]), 0),
        (Body::WriteFirst(target), 1),
        (Body::WriteMiddle, 1),
        (Body::WriteLast([0; 48]), 1),
        (Body::Probe, 0),
        (Body::WriteOnly(target, [0; 48]), 3),
        (Body::Acknowledge(Syndrome::Ack), 0),
        (Body::Hello, 0),
        (Body::Ready, 0),
        (Body::Bye, 0),
    ]
}

#[test]
fn the_table_of_opcodes_is_the_code() {
    let secret = Secret([0; 16]);
    let table = rows("| opcode | what follows");
    assert_eq!(table.len(), bodies().len());
    for (row, (body, payload)) in table.iter().zip(bodies()) {
        let mut bytes = Vec::new();
        Packet { qpn: 1, psn: Psn::new(0), ack_request: false, body }.encode(&vec![0; payload], &secret, &mut bytes);
        assert_eq!((bytes[0].to_string().as_str(), name(&body).as_str()), (row[0], row[2]));
        let parts = [("target", 16), ("immediate", 48), ("acknowledge", 4), ("payload", payload)];
        let documented: usize = parts.iter().filter(|(part, _)| row[1].contains(part)).map(|(_, size)| size).sum();
        assert_eq!(bytes.len(), 12 + documented + 4, "{}", row[2]);
        assert!(Packet::decode(&bytes, &secret).is_ok());
    }
}

fn name(body: &Body) -> String {
    let text = format!("{body:?}");
    text.split('(').next().unwrap_or_default().to_string()
}

#[test]
fn the_base_header_of_a_packet_is_where_the_page_says() {
    let encode = |body, qpn, psn, ack_request| {
        let mut bytes = Vec::new();
        Packet { qpn, psn: Psn::new(psn), ack_request, body }.encode(&[], &Secret([0; 16]), &mut bytes);
        bytes
    };
    let base = encode(Body::Probe, 0, 0, false);
    let changed = |other: Vec<u8>| (0..12).filter(|at| base[*at] != other[*at]).collect::<Vec<usize>>();
    let fields = [
        ("opcode", changed(encode(Body::Hello, 0, 0, false))),
        ("flags", changed(encode(Body::Probe, 0, 0, true))),
        ("version", vec![2]),
        ("qpn", changed(encode(Body::Probe, Psn::MASK, 0, false))),
        ("psn", changed(encode(Body::Probe, 0, Psn::MASK, false))),
    ];
    assert_eq!(base[2..4], [1, 0]);
    let mut end = 0;
    let table = rows("| at | bytes | field of the base header |");
    assert_eq!(table.len(), fields.len());
    for (row, (field, bytes)) in table.iter().zip(fields) {
        let (at, size): (usize, usize) = (row[0].parse().unwrap(), row[1].parse().unwrap());
        assert_eq!((at, row[2]), (end, field));
        end = at + size;
        assert!(bytes.first() == Some(&at) && bytes.iter().all(|byte| *byte < end), "{field}: {bytes:?}");
    }
    assert_eq!(end, 12);
}

#[test]
fn the_parts_of_a_ring_are_where_the_page_says() {
    let documented = rows("| offset | size | ring part |");
    let documented = documented.iter().map(|row| (row[2], row[0].parse().unwrap(), row[1].parse().unwrap()));
    assert!(documented.eq(RING_LAYOUT), "{RING_LAYOUT:?}");
    let (_, offset, bytes) = RING_LAYOUT[RING_LAYOUT.len() - 1];
    let total = offset + bytes;
    assert!(PAGE.contains(&format!("Ring ({},{:03} bytes", total / 1000, total % 1000)));
}

#[test]
fn the_share_messages_are_the_code() {
    let region = ShareMessage::Region { rkey: u32::MAX, len: u64::MAX };
    let documented = rows("| kind | share message |");
    assert_eq!(documented.len(), 3);
    for (row, message) in documented.iter().zip([ShareMessage::Ring, region, ShareMessage::Wake]) {
        assert!(format!("{message:?}").starts_with(row[1]), "{message:?}");
        assert_eq!(message.encode()[..4], row[0].parse::<u32>().unwrap().to_le_bytes(), "{message:?}");
        assert_eq!(message.descriptors().to_string(), row[2], "{message:?}");
    }
    let mut end = 0;
    for row in rows("| offset | size | share field |") {
        let (offset, size): (usize, usize) = (row[0].parse().unwrap(), row[1].parse().unwrap());
        assert_eq!(offset, end, "a hole before {}", row[2]);
        end = offset + size;
        let all_ones = region.encode()[offset..end].iter().all(|byte| *byte == u8::MAX);
        assert_eq!(all_ones, row[2] != "kind", "{}", row[2]);
    }
    assert_eq!(end, ShareMessage::SIZE);
    assert!(PAGE.contains(&format!("Share message ({} bytes", ShareMessage::SIZE)));
}
