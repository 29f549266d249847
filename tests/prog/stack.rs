//! The stack that the programs take, as kernels before 6.8 count it.
//!
//! Those round every frame up to 32 bytes, newer ones to 16: what this kernel loads, 6.1 may refuse. So the frames are
//! read off the object itself.

use std::collections::{BTreeMap, HashSet};

use aya_obj::{Object, generated::bpf_insn};
use lb_userspace::dataplane::OBJECT;

/// Of a chain of calls, linux/filter.h.
const LIMIT: u32 = 512;
/// What a frame is rounded up to.
const ROUND: u32 = 32;

const CALL: u8 = 0x85;
const LOAD_IMMEDIATE: u8 = 0x18;
const MOVE: u8 = 0xbf;
const ADD_IMMEDIATE: u8 = 0x07;
const FRAME_POINTER: u8 = 10;
/// A call, or an address, of a function of the same program.
const PSEUDO_CALL: u8 = 1;
const PSEUDO_FUNCTION: u8 = 4;

/// A function: its frame in bytes, and where those start that it calls.
#[derive(Default)]
struct Function {
    frame: u32,
    calls: Vec<usize>,
}

#[test]
fn no_chain_of_calls_takes_more_stack_than_older_kernels_have() {
    let mut object = Object::parse(OBJECT).expect("the object");
    let sections: HashSet<usize> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    object.relocate_calls(&sections).expect("calls");
    let mut names: Vec<_> = object.programs.keys().cloned().collect();
    names.sort();
    let mut refused = Vec::new();
    for name in names {
        let code = &object.functions[&object.programs[&name].function_key()].instructions;
        let functions = functions(code);
        let (depth, chain) = deepest(&functions, 0);
        println!("{name}: {depth} bytes, frames {chain:?}");
        if depth > LIMIT {
            refused.push(format!(
                "{name}: {depth} of {LIMIT} bytes, frames {chain:?}"
            ));
        }
    }
    assert!(refused.is_empty(), "{refused:#?}");
}

/// Every function of a program, by where it starts.
fn functions(code: &[bpf_insn]) -> BTreeMap<usize, Function> {
    let target = |at: usize, instruction: &bpf_insn| {
        usize::try_from(at as i64 + 1 + i64::from(instruction.imm)).expect("a target")
    };
    let is_call = |instruction: &bpf_insn| match instruction.code {
        CALL => instruction.src_reg() == PSEUDO_CALL,
        LOAD_IMMEDIATE => instruction.src_reg() == PSEUDO_FUNCTION,
        _ => false,
    };
    let mut functions = BTreeMap::from([(0, Function::default())]);
    for (at, instruction) in code.iter().enumerate().filter(|(_, it)| is_call(it)) {
        functions.entry(target(at, instruction)).or_default();
    }
    let mut current = 0;
    for (at, instruction) in code.iter().enumerate() {
        if functions.contains_key(&at) {
            current = at;
        }
        let function = functions.get_mut(&current).expect("a function");
        if is_call(instruction) {
            function.calls.push(target(at, instruction));
        }
        let next = code.get(at + 1);
        let below = match instruction.code {
            MOVE if instruction.src_reg() == FRAME_POINTER => next
                .filter(|next| {
                    next.code == ADD_IMMEDIATE && next.dst_reg() == instruction.dst_reg()
                })
                .map_or(0, |next| -next.imm),
            // Loads by the source, stores by the destination.
            code if code & 7 == 1 && instruction.src_reg() == FRAME_POINTER => {
                -i32::from(instruction.off)
            }
            code if matches!(code & 7, 2 | 3) && instruction.dst_reg() == FRAME_POINTER => {
                -i32::from(instruction.off)
            }
            _ => 0,
        };
        function.frame = function.frame.max(u32::try_from(below).unwrap_or_default());
    }
    functions
}

/// The chain of calls from here that takes the most stack.
fn deepest(functions: &BTreeMap<usize, Function>, at: usize) -> (u32, Vec<u32>) {
    let function = &functions[&at];
    let below = function.calls.iter().map(|call| deepest(functions, *call));
    let (depth, mut chain) = below.max_by_key(|(depth, _)| *depth).unwrap_or_default();
    chain.insert(0, function.frame);
    (depth + function.frame.max(1).next_multiple_of(ROUND), chain)
}
