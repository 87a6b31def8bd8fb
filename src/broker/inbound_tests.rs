//! What passes the filter unchanged, what it corrects, and that no cut of the stream matters to it.

use std::iter;

use lapin::protocol::basic::parse_properties;
use lapin::types::AMQPValue;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&[kind, 0, 1], &length[..], payload, &[0xce]].concat()
}

fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

fn long(content: &[u8]) -> Vec<u8> {
    [&u32::try_from(content.len()).unwrap().to_be_bytes(), content].concat()
}

fn entry(key: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
    [short(key), vec![kind], value.to_vec()].concat()
}

fn deliver(routing_key: &[u8]) -> Vec<u8> {
    let text = [short(b"submit"), vec![0; 9], short(b"commands"), short(routing_key)].concat();
    frame(METHOD, &[&[0, 60, 0, 60], &text[..]].concat())
}

/// The 14 properties, each as it is on the wire.
fn header(properties: [Option<Vec<u8>>; 14]) -> Vec<u8> {
    let mut flags = 0_u16;
    for (index, property) in properties.iter().enumerate() {
        flags |= u16::from(property.is_some()) << (15 - index);
    }
    let values = properties.into_iter().flatten().flatten();
    let start = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9].into_iter();
    frame(HEADER, &start.chain(flags.to_be_bytes()).chain(values).collect::<Vec<_>>())
}

/// Every property is there, and `text` wherever a text may be.
fn full_header(text: &[u8]) -> Vec<u8> {
    let inner = [entry(text, b't', &[1]), entry(text, b'S', &long(text))].concat();
    let list = [&b"F"[..], &long(&inner)[..], b"V"].concat();
    let values = [
        entry(text, b'V', &[]),
        entry(b"D", b'D', &[1; 5]),
        entry(b"l", b'l', &[0xff; 8]),
        entry(text, b'A', &long(&list)),
        entry(b"s", b's', &[0xff; 2]),
        entry(text, b'F', &long(&inner)),
        entry(b"x", b'x', &long(&[0xff])),
        entry(text, b'I', &[0xff; 4]),
    ];
    header(std::array::from_fn(|index| {
        Some(match index {
            2 => long(&values.concat()),
            3 | 4 => vec![0xff],
            9 => vec![0xff; 8],
            _ => short(text),
        })
    }))
}

/// What comes out where the source gives at most as many bytes as the next of `cuts`, and now and
/// then none, to a reader with a buffer of `room` bytes.
fn passed(mut input: &[u8], cuts: impl IntoIterator<Item = usize>, room: usize) -> Vec<u8> {
    let mut filter = Inbound::default();
    let (mut output, mut into) = (Vec::new(), vec![0; room]);
    let mut cuts = cuts.into_iter().chain(iter::repeat(usize::MAX));
    loop {
        let source = |into: &mut [u8]| {
            let count = cuts.next().unwrap().min(into.len()).min(input.len());
            if count == 0 && !input.is_empty() {
                return Poll::Pending;
            }
            let (given, rest) = input.split_at(count);
            into[..count].copy_from_slice(given);
            input = rest;
            Poll::Ready(Ok(count))
        };
        match filter.poll_read(&mut into, source) {
            Poll::Ready(Ok(0)) => return output,
            Poll::Ready(Ok(count)) => output.extend_from_slice(&into[..count]),
            Poll::Ready(Err(error)) => panic!("{error}"),
            Poll::Pending => {}
        }
    }
}

fn payload(header: &[u8]) -> &[u8] {
    &header[FRAME_HEADER_BYTES..header.len() - 1]
}

#[test]
fn text_that_is_not_utf_8_is_corrected_wherever_the_stream_is_cut() {
    let stream = |text: &[u8]| {
        let body = frame(BODY, b"\xf1\xff\x01\x02");
        [deliver(text), full_header(text), body.clone(), body, frame(HEARTBEAT, b""), deliver(text)]
            .concat()
    };
    let (broken, corrected) = (stream(b"campa\xf1a\xff"), stream(b"campa\x1aa\x1a"));
    // Long strings are bytes, and stay as they are.
    let expected = {
        let mut expected = corrected;
        for (at, window) in broken.windows(13).enumerate() {
            if window.starts_with(b"S\0\0\0\x08") {
                expected[at..at + 13].copy_from_slice(window);
            }
        }
        expected
    };
    for cut in 0..=broken.len() {
        for room in [1, 5, 100, 100_000] {
            assert_eq!(passed(&broken, [cut], room), expected, "cut at {cut}, room for {room}");
        }
    }
    assert_eq!(passed(&broken, iter::repeat_n(1, broken.len()), 1), expected);
}

#[test]
fn an_id_that_is_cut_within_a_character_is_corrected_to_its_end() {
    let id = |text: &[u8]| {
        let mut properties = [const { None }; 14];
        properties[7] = Some(short(text));
        header(properties)
    };
    for (broken, corrected) in [
        ("año €".as_bytes(), "año €".as_bytes()),
        (b"a\xe2\x82", b"a\x1a\x1a"),
        (b"\xe2\x82z", b"\x1a\x1az"),
        (b"\xed\xa0\x80", b"\x1a\x1a\x1a"),
        (b"\xc0\x80", b"\x1a\x1a"),
        (b"", b""),
    ] {
        assert_eq!(passed(&id(broken), [], 1000), id(corrected));
    }
}

#[test]
fn other_methods_and_what_is_no_amqp_pass_as_they_are() {
    let mut others = frame(METHOD, b"\0\x14\0\x28\0\x05\xff\xff\xff\xff\xff");
    others.extend(frame(HEADER, b"\0\x3d\xff\xff"));
    others.extend(b"AMQP\0\0\x09\x01\xff\xff\xff\xff\xff\xff\xff");
    assert_eq!(passed(&others, [], 1000), others);
}

#[test]
fn a_body_is_handed_on_as_soon_as_it_comes_and_is_never_held() {
    let large = frame(BODY, &vec![0xff; 128 * 1024]);
    let mut filter = Inbound::default();
    let mut into = vec![0; large.len()];
    let first = filter.poll_read(&mut into, |into| {
        into[..5000].copy_from_slice(&large[..5000]);
        Poll::Ready(Ok(5000))
    });
    assert!(matches!(first, Poll::Ready(Ok(5000))));
    assert_eq!((filter.held.capacity(), filter.passing), (0, large.len() as u64 - 5000));
}

#[test]
fn a_header_of_more_than_16_mebibytes_is_an_error_and_not_memory() {
    let mut into = [0; 100];
    let read = Inbound::default().poll_read(&mut into, |into| {
        into[..7].copy_from_slice(b"\x02\0\x01\xff\0\0\0");
        Poll::Ready(Ok(7))
    });
    let Poll::Ready(Err(error)) = read else { panic!("{read:?}") };
    assert_eq!(
        error.to_string(),
        "the broker sent a method or content header frame of 4278190088 bytes, and at most 16777216 are read"
    );
}

#[test]
fn nesting_that_would_overflow_the_parsers_stack_becomes_bytes() {
    let nested = |kind: u8| {
        let mut value = Vec::new();
        for _ in 0..20_000 {
            let key = if kind == b'F' { &b"\0"[..] } else { b"" };
            // Put together from behind: each level is longer than the one within it.
            let length = u32::try_from(value.len()).unwrap().to_le_bytes();
            value.extend(length.iter());
            value.push(kind);
            value.extend(key);
        }
        value.reverse();
        let mut properties = [const { None }; 14];
        properties[2] = Some(long(&[b"\x01k", &value[usize::from(kind == b'F')..]].concat()));
        passed(&header(properties), [], 1000)
    };
    for kind in [b'A', b'F'] {
        let corrected = nested(kind);
        let (_, properties) = parse_properties(&payload(&corrected)[12..]).unwrap();
        let mut value = properties.headers().as_ref().unwrap().inner()["k"].clone();
        let mut depth = 0;
        loop {
            value = match value {
                AMQPValue::FieldArray(list) => list.as_slice()[0].clone(),
                AMQPValue::FieldTable(table) => table.inner().values().next().unwrap().clone(),
                AMQPValue::ByteArray(_) => break,
                other => panic!("{:?} at {depth}", other.get_type()),
            };
            depth += 1;
        }
        assert_eq!(depth, MAX_DEPTH);
    }
}

fn value(text: impl Strategy<Value = Vec<u8>> + Clone + 'static) -> BoxedStrategy<(u8, Vec<u8>)> {
    const SIZES: [(&[u8], usize); 6] =
        [(b"V", 0), (b"tbB", 1), (b"sUu", 2), (b"Iif", 4), (b"D", 5), (b"LldT", 8)];
    let fixed = prop::sample::select(&SIZES)
        .prop_flat_map(|(kinds, size)| (prop::sample::select(kinds), vec(any::<u8>(), size)));
    let bytes = (prop::sample::select(&b"Sx"[..]), vec(any::<u8>(), 0..20))
        .prop_map(|(kind, content)| (kind, long(&content)));
    prop_oneof![fixed, bytes]
        .prop_recursive(4, 32, 4, move |inner| {
            let tables = vec((text.clone(), inner.clone()), 0..4).prop_map(|entries| {
                let entries = entries.iter().flat_map(|(key, (kind, v))| entry(key, *kind, v));
                (b'F', long(&entries.collect::<Vec<_>>()))
            });
            let arrays = vec(inner, 0..4).prop_map(|values| {
                let values = values.into_iter().flat_map(|(kind, v)| iter::once(kind).chain(v));
                (b'A', long(&values.collect::<Vec<_>>()))
            });
            prop_oneof![tables, arrays]
        })
        .boxed()
}

fn headers(text: impl Strategy<Value = Vec<u8>> + Clone + 'static) -> BoxedStrategy<Vec<u8>> {
    let property = |text| prop::option::of(text);
    let table = vec((text.clone(), value(text.clone())), 0..4).prop_map(|entries| {
        let entries = entries.iter().flat_map(|(key, (kind, v))| entry(key, *kind, v));
        long(&entries.collect::<Vec<_>>())
    });
    let texts = vec(property(text.prop_map(|text| short(&text))), 14);
    (texts, prop::option::of(table), prop::option::of(Just(vec![0xff])))
        .prop_map(|(texts, table, number)| {
            let mut properties: [_; 14] = texts.try_into().unwrap();
            properties[2] = table;
            properties[3].clone_from(&number);
            properties[9] = number.as_ref().map(|_| vec![0xff; 8]);
            properties[4] = number;
            header(properties)
        })
        .boxed()
}

fn any_text() -> impl Strategy<Value = Vec<u8>> + Clone {
    vec(prop_oneof![any::<u8>(), Just(b'a')], 0..20)
}

fn good_text() -> impl Strategy<Value = Vec<u8>> + Clone {
    "\\PC{0,10}".prop_map(String::into_bytes)
}

fn frames() -> impl Strategy<Value = Vec<u8>> {
    let other = vec(any::<u8>(), 0..30).prop_map(|mut payload| {
        payload.splice(0..0, [0, 20, 0, 40]);
        frame(METHOD, &payload)
    });
    let one = prop_oneof![
        other,
        good_text().prop_map(|key| deliver(&key)),
        headers(good_text()),
        vec(any::<u8>(), 0..100).prop_map(|body| frame(BODY, &body)),
        Just(frame(HEARTBEAT, b"")),
    ];
    vec(one, 0..8).prop_map(|frames| frames.concat())
}

proptest! {
    #[test]
    fn what_is_utf_8_passes_unchanged(
        stream in frames(), cuts in vec(0_usize..40, 0..100), room in 1_usize..300,
    ) {
        prop_assert_eq!(passed(&stream, cuts, room), stream);
    }

    #[test]
    fn whatever_the_texts_are_lapin_can_read_the_properties(
        header in headers(any_text()), cuts in vec(0_usize..40, 0..100),
    ) {
        let corrected = passed(&header, cuts, 100);
        prop_assert_eq!(corrected.len(), header.len());
        let (rest, _) = parse_properties(&payload(&corrected)[12..]).unwrap();
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn no_bytes_at_all_make_it_panic_or_change_their_number(
        kind in prop::sample::select(&[METHOD, HEADER][..]),
        begin in prop::sample::select(vec![&[0, 60, 0, 60][..], &[0, 60], &[]]),
        rest in vec(any::<u8>(), 0..200),
    ) {
        let stream = frame(kind, &[begin, &rest].concat());
        prop_assert_eq!(passed(&stream, [], 1000).len(), stream.len());
    }
}

#[test]
fn headers_that_no_frame_has_room_for_are_taken_out_and_the_rest_stays() {
    let large = entry(b"large", b'S', &long(&vec![b'x'; 200 * 1024]));
    let with_headers = |table: &[u8]| {
        header(std::array::from_fn(|index| match index {
            2 => Some(long(table)),
            3 | 4 => Some(vec![1]),
            9 => Some(vec![0; 8]),
            _ => Some(short(b"text")),
        }))
    };
    let number = i64::try_from(large.len()).unwrap().to_be_bytes();
    let cut = with_headers(&entry(CUT.as_bytes(), b'l', &number));
    let (before, body) = (deliver(b"key"), frame(BODY, b"{}"));
    let input = [&before[..], &with_headers(&large), &body, &before].concat();
    let output = [&before[..], &cut, &body, &before].concat();
    for (cuts, room) in [(vec![], 1 << 20), (vec![1; 300], 64), (vec![7, 100_000], 4096)] {
        assert_eq!(passed(&input, cuts, room), output);
    }
    let small = with_headers(&entry(b"small", b'S', &long(b"x")));
    assert_eq!(passed(&small, [], 1 << 20), small);
}
