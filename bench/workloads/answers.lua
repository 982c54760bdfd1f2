-- For wrk(1): how many answers came in each 10 ms, by CLOCK_MONOTONIC, and how many were none.
-- At the end one line: BIN:ANSWERS of each thread, then "bad" and their number.
local ffi = require("ffi")
ffi.cdef [[
typedef struct { long s, ns; } moment;
int clock_gettime(int clock, moment *now);
]]
local now, current, count = ffi.new("moment"), 0, 0
local threads = {}
-- Of a thread, and read by the first one: strings and numbers are all that wrk hands over.
answers, bad = "", 0

function setup(thread)
   table.insert(threads, thread)
end

function response(status)
   ffi.C.clock_gettime(1, now)
   local bin = math.floor(tonumber(now.s) * 100 + tonumber(now.ns) / 1e7)
   if bin ~= current then
      answers = answers .. string.format("%d:%d ", current, count)
      current, count = bin, 0
   end
   count = count + 1
   if status ~= 200 then
      bad = bad + 1
   end
end

function done(summary)
   local wrong = summary.errors.connect + summary.errors.read + summary.errors.write
   for _, thread in ipairs(threads) do
      io.write(thread:get("answers"))
      wrong = wrong + thread:get("bad")
   end
   io.write("bad ", wrong, "\n")
end
