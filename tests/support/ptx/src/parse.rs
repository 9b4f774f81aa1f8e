//! A module's text to its functions.
//!
//! Invariant: whatever of the text is not understood is an error that names the line; every branch goes to an instruction of
//! its own function, every register is declared.

use std::{collections::HashMap, sync::Arc};

use crate::{
    ParseError,
    decode::{operation, shape},
    instruction::{Guard, Instruction, OPERANDS_MAX, Operation, Source, Special, Type},
    lexer::{Kind, Token, tokens},
};

/// A PTX module that can be run.
#[derive(Clone, Debug)]
pub struct Module {
    functions: HashMap<String, Arc<Function>>,
}

/// A kernel (`.entry`).
#[derive(Debug)]
pub struct Function {
    pub(crate) name: String,
    pub(crate) parameters: Vec<Type>,
    pub(crate) instructions: Vec<Instruction>,
    pub(crate) registers: usize,
    pub(crate) shared_bytes: usize,
    /// Threads of a block, at most.
    pub(crate) threads_max: u32,
}

impl Module {
    /// Reads a module.
    ///
    /// # Errors
    ///
    /// The line and what is wrong with it: an opcode that is unknown here, above all.
    pub fn parse(text: &str) -> Result<Module, ParseError> {
        let tokens = tokens(text)?;
        let mut parser = Parser { tokens: &tokens, next: 0 };
        let mut functions = HashMap::new();
        while let Some(token) = parser.tokens.get(parser.next) {
            match parser.word()?.as_str() {
                ".version" | ".target" | ".address_size" => parser.skip_line(token.line),
                ".visible" => {}
                ".entry" => {
                    let function = parser.function()?;
                    functions.insert(function.name.clone(), Arc::new(function));
                }
                other => return parser.fail(format!("`{other}` is unknown outside a function")),
            }
        }
        Ok(Module { functions })
    }

    /// The kernel of this name.
    pub fn function(&self, name: &str) -> Option<&Arc<Function>> {
        self.functions.get(name)
    }

    /// The names of all kernels, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.functions.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }
}

impl Function {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The size of each parameter in bytes.
    pub fn parameter_sizes(&self) -> Vec<usize> {
        self.parameters.iter().map(|parameter| parameter.size).collect()
    }
}

/// What the names in a function stand for.
#[derive(Default)]
struct Scope {
    registers: HashMap<String, u32>,
    count: u32,
    parameters: HashMap<String, u64>,
    shared: HashMap<String, u64>,
    labels: HashMap<String, usize>,
    /// Branches, by the index of their instruction, with the label and the line.
    branches: Vec<(usize, String, u32)>,
}

struct Parser<'a> {
    tokens: &'a [Token],
    next: usize,
}

/// An operand as the text has it.
enum Operand {
    Values(Vec<String>),
    One(Kind),
    Address(Kind, u64),
}

impl Parser<'_> {
    fn line(&self) -> u32 {
        self.tokens.get(self.next.saturating_sub(1)).map_or(0, |token| token.line)
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T, ParseError> {
        Err(ParseError { line: self.line(), message: message.into() })
    }

    fn take(&mut self) -> Result<Kind, ParseError> {
        let token = self.tokens.get(self.next);
        self.next += 1;
        token.map_or_else(|| self.fail("the text ends in the middle"), |token| Ok(token.kind.clone()))
    }

    fn word(&mut self) -> Result<String, ParseError> {
        match self.take()? {
            Kind::Word(word) => Ok(word),
            other => self.fail(format!("a word was expected here, not {other:?}")),
        }
    }

    fn number(&mut self) -> Result<u64, ParseError> {
        match self.take()? {
            Kind::Number(number) => Ok(number),
            other => self.fail(format!("a number was expected here, not {other:?}")),
        }
    }

    fn is_mark(&self, mark: char) -> bool {
        self.tokens.get(self.next).is_some_and(|token| token.kind == Kind::Mark(mark))
    }

    fn skip(&mut self, mark: char) -> bool {
        let found = self.is_mark(mark);
        self.next += usize::from(found);
        found
    }

    fn expect(&mut self, mark: char) -> Result<(), ParseError> {
        if self.skip(mark) { Ok(()) } else { self.fail(format!("`{mark}` was expected after this")) }
    }

    fn skip_line(&mut self, line: u32) {
        while self.tokens.get(self.next).is_some_and(|token| token.line == line) {
            self.next += 1;
        }
    }

    fn kind(&mut self) -> Result<Type, ParseError> {
        let word = self.word()?;
        let named = word.strip_prefix('.').and_then(Type::named);
        named.map_or_else(|| self.fail(format!("`{word}` is not a type")), Ok)
    }

    fn function(&mut self) -> Result<Function, ParseError> {
        let mut scope = Scope::default();
        let mut function = Function {
            name: self.word()?,
            parameters: Vec::new(),
            instructions: Vec::new(),
            registers: 0,
            shared_bytes: 0,
            threads_max: 1024,
        };
        self.expect('(')?;
        while !self.skip(')') {
            if self.word()? != ".param" {
                return self.fail("a parameter was expected here");
            }
            function.parameters.push(self.kind()?);
            scope.parameters.insert(self.word()?, scope.parameters.len() as u64);
            self.skip(',');
        }
        while !self.skip('{') {
            match self.word()?.as_str() {
                ".maxntid" => {
                    function.threads_max = self.number()? as u32;
                    while self.skip(',') {
                        self.number()?;
                    }
                }
                ".minnctapersm" => _ = self.number()?,
                other => return self.fail(format!("`{other}` is unknown before a function's body")),
            }
        }
        let mut depth = 1;
        while depth > 0 {
            if self.skip('{') {
                depth += 1;
            } else if self.skip('}') {
                depth -= 1;
            } else {
                self.statement(&mut scope, &mut function)?;
            }
        }
        for (index, label, line) in scope.branches {
            let Some(target) = scope.labels.get(&label).filter(|target| **target < function.instructions.len()) else {
                return Err(ParseError { line, message: format!("no instruction follows a label `{label}`") });
            };
            function.instructions[index].operation = Operation::Branch(*target);
        }
        function.registers = scope.count as usize;
        Ok(function)
    }

    fn statement(&mut self, scope: &mut Scope, function: &mut Function) -> Result<(), ParseError> {
        let guard = if self.skip('@') {
            let wanted = u64::from(!self.skip('!'));
            let name = self.word()?;
            Some(Guard { register: self.register(scope, &name)?, wanted })
        } else {
            None
        };
        let word = self.word()?;
        match word.as_str() {
            ".reg" => self.registers(scope),
            ".shared" => self.shared(scope, function),
            ".pragma" => {
                self.take()?;
                self.expect(';')
            }
            label if self.is_mark(':') => {
                self.next += 1;
                scope.labels.insert(label.to_owned(), function.instructions.len());
                Ok(())
            }
            opcode => self.instruction(opcode, guard, scope, function),
        }
    }

    /// `.reg .b32 %r<5>;` or `.reg .b16 tmp;`. A name that is declared again in an inner block is another register.
    fn registers(&mut self, scope: &mut Scope) -> Result<(), ParseError> {
        self.kind()?;
        let name = self.word()?;
        if self.skip('<') {
            let count = self.number()?;
            if count > 1 << 16 {
                return self.fail(format!("{count} registers are too many"));
            }
            for index in 0..count {
                scope.registers.insert(format!("{name}{index}"), scope.count);
                scope.count += 1;
            }
            self.expect('>')?;
        } else {
            scope.registers.insert(name, scope.count);
            scope.count += 1;
        }
        self.expect(';')
    }

    /// `.shared .align 4 .b8 name[32768];`
    fn shared(&mut self, scope: &mut Scope, function: &mut Function) -> Result<(), ParseError> {
        let mut word = self.word()?;
        let mut align = 1;
        if word == ".align" {
            align = self.number()?.max(1) as usize;
            word = self.word()?;
        }
        let Some(kind) = word.strip_prefix('.').and_then(Type::named) else {
            return self.fail(format!("`{word}` is not a type"));
        };
        let name = self.word()?;
        self.expect('[')?;
        let count = self.number()? as usize;
        self.expect(']')?;
        let start = function.shared_bytes.next_multiple_of(align);
        function.shared_bytes = start.saturating_add(count.saturating_mul(kind.size));
        if function.shared_bytes > 48 << 10 {
            return self.fail("more than 48 KiB of shared memory");
        }
        scope.shared.insert(name, start as u64);
        self.expect(';')
    }

    fn instruction(
        &mut self,
        opcode: &str,
        guard: Option<Guard>,
        scope: &mut Scope,
        function: &mut Function,
    ) -> Result<(), ParseError> {
        let line = self.line();
        let Some((mut operation, width)) = operation(opcode) else {
            return self.fail(format!("opcode `{opcode}` is unknown to this interpreter"));
        };
        let mut instruction = Instruction {
            operation,
            guard,
            width,
            targets: [0; 4],
            sources: [Source::Immediate(0); OPERANDS_MAX],
            offset: 0,
            line,
        };
        if let Operation::Branch(_) = operation {
            scope.branches.push((function.instructions.len(), self.word()?, line));
            self.expect(';')?;
            function.instructions.push(instruction);
            return Ok(());
        }
        let mut operands = Vec::new();
        while !self.skip(';') {
            operands.push(self.operand()?);
            self.skip(',');
        }
        if let (Operation::Move(kind), Some(Operand::Values(_))) = (operation, operands.first()) {
            operation = Operation::Unpack(4 * kind.size as u32);
            instruction.operation = operation;
        }
        self.assign(&mut instruction, operands, scope)?;
        function.instructions.push(instruction);
        Ok(())
    }

    /// Fills in targets and sources.
    fn assign(&self, instruction: &mut Instruction, operands: Vec<Operand>, scope: &Scope) -> Result<(), ParseError> {
        let mut shape = shape(instruction.operation);
        match instruction.operation {
            Operation::Load(..) => shape.targets = instruction.width,
            Operation::Store(..) => shape.sources = 1 + instruction.width,
            _ => {}
        }
        let mut names = Vec::new();
        for operand in operands {
            match operand {
                Operand::Values(values) => names.extend(values.into_iter().map(Kind::Word)),
                Operand::One(kind) => names.push(kind),
                Operand::Address(base, offset) => {
                    instruction.offset = offset;
                    names.push(base);
                }
            }
        }
        if names.len() != shape.targets + shape.sources {
            return self.fail(format!("{} operands where {shape:?} are expected", names.len()));
        }
        for (index, name) in names.into_iter().enumerate() {
            if let Some(source) = index.checked_sub(shape.targets) {
                instruction.sources[source] = self.source(scope, name)?;
            } else if let Kind::Word(name) = name {
                instruction.targets[index] = self.register(scope, &name)?;
            } else {
                return self.fail("the result goes to something that is not a register");
            }
        }
        Ok(())
    }

    fn operand(&mut self) -> Result<Operand, ParseError> {
        if self.skip('{') {
            let mut values = Vec::new();
            while !self.skip('}') {
                values.push(self.word()?);
                self.skip(',');
            }
            return Ok(Operand::Values(values));
        }
        if self.skip('[') {
            let base = self.take()?;
            let offset = if self.skip('+') { self.number()? } else { 0 };
            self.expect(']')?;
            return Ok(Operand::Address(base, offset));
        }
        Ok(Operand::One(self.take()?))
    }

    fn register(&self, scope: &Scope, name: &str) -> Result<u32, ParseError> {
        let register = scope.registers.get(name).copied();
        register.map_or_else(|| self.fail(format!("`{name}` is not a register")), Ok)
    }

    fn source(&self, scope: &Scope, name: Kind) -> Result<Source, ParseError> {
        let word = match name {
            Kind::Number(number) => return Ok(Source::Immediate(number)),
            Kind::Word(word) => word,
            other => return self.fail(format!("{other:?} is not an operand")),
        };
        Ok(match word.as_str() {
            "%tid.x" => Source::Special(Special::Thread),
            "%ctaid.x" => Source::Special(Special::Block),
            "%ntid.x" => Source::Special(Special::Threads),
            "%nctaid.x" => Source::Special(Special::Blocks),
            name => match scope.parameters.get(name).or_else(|| scope.shared.get(name)) {
                Some(place) => Source::Immediate(*place),
                None => Source::Register(self.register(scope, name)?),
            },
        })
    }
}
