package kube

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"

	"k8s.io/apimachinery/pkg/watch"
)

// frames splits the body of a watch into events. API servers write each on a line
// of its own, and its type before the object, so that most need not be parsed to be
// split; where that is not so, they are.
type frames struct {
	in      *bufio.Reader
	line    []byte        // used again
	decoder *json.Decoder // once a line was not an event
}

// frame is an event as it is on the wire.
type frame struct {
	Type   watch.EventType
	Object json.RawMessage
}

// next gives an event's type and object, which is valid until the next call.
func (f *frames) next() (watch.EventType, []byte, error) {
	if f.decoder != nil {
		var e frame
		err := f.decoder.Decode(&e)
		return e.Type, e.Object, err
	}
	f.line = f.line[:0]
	for {
		part, err := f.in.ReadSlice('\n')
		f.line = append(f.line, part...)
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return "", nil, err
		}
	}
	if typ, object, ok := splitFrame(f.line); ok {
		return typ, object, nil
	}
	f.decoder = json.NewDecoder(io.MultiReader(bytes.NewReader(bytes.Clone(f.line)), f.in))
	return f.next()
}

func splitFrame(line []byte) (typ watch.EventType, object []byte, ok bool) {
	rest, ok := bytes.CutPrefix(line, []byte(`{"type":"`))
	if !ok {
		return "", nil, false
	}
	name, rest, ok := bytes.Cut(rest, []byte(`","object":`))
	if !ok {
		return "", nil, false
	}
	object, ok = bytes.CutSuffix(bytes.TrimRight(rest, "\r\n"), []byte("}"))
	return watch.EventType(name), object, ok
}
